"""The report's tables on what was measured beside the errors: latency, streams, drops, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi05_lab.evaluation.open_loop import format as show
from pi05_lab.evaluation.open_loop import html as html


def latency(summary: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, policy in summary["policies"].items():
        for stage, figures in policy["latency"]["stages_ms"].items():
            rows.append((f"{name}: {stage}", *(f"{value:.1f}" for value in figures)))
    if not rows:
        return [html.paragraph("Not measured.")]
    parts = [
        html.table(
            "On this machine, ms; decode is the pictures' conversion, total the time from the "
            "observation to the chunk.",
            ("stage", "p50", "p95", "p99"),
            rows,
        )
    ]
    delay_ms = 1e3 * summary["settings"].get("delay_s", 0.0)
    for name, policy in summary["policies"].items():
        slow = policy["latency"]["slower_than_delay"]
        parts.append(
            html.paragraph(
                f"{name}: {slow} of {policy['inferences']} inferences took longer than the "
                f"{delay_ms:.0f} ms that the schedulers were given."
            )
        )
    return parts


def streams(summary: Mapping[str, Any]) -> list[str]:
    parts = []
    for each in summary["recordings"]:
        rows = [
            (
                stream["topic"],
                str(stream["messages"]),
                f"{stream['rate_hz']:.1f}",
                *show.three(stream["period_ms"]),
                *show.three(stream["age_ms"]),
                str(stream["gaps"]),
                "; ".join(f"{ms:.0f} at {at_s:.1f} s" for ms, at_s in stream["longest_gaps"][:3]),
                str(stream["out_of_order"]),
            )
            for stream in each["streams"]
        ]
        skew = " / ".join(show.three(each["skew_ms"]))
        age = " / ".join(show.three(each["age_ms"]))
        parts.append(
            html.table(
                f"{each['name']}. Age: from the stamp to the receipt. Observations: skew between "
                f"cameras p50 / p95 / p99 {skew} ms, age {age} ms.",
                ("topic", "messages", "Hz", "period p50 ms", "p99", "max", "age p50 ms", "p95",
                 "p99", "gaps", "longest, ms", "out of order"),
                rows,
                (0, 10),
            )
        )  # fmt: skip
    return parts


def dropped(summary: Mapping[str, Any]) -> list[str]:
    rows = [(name, "not used at all", "", reason) for name, reason in summary["failed"].items()]
    rows += [
        (
            note["recording"],
            f"{note['count']} ×",
            "" if note["first_s"] is None else f"{note['first_s']:.2f}",
            note["text"],
        )
        for note in summary["dropped"]
    ]
    if not rows:
        return [html.paragraph("Nothing.")]
    return [
        html.table(
            "By reason; numbers within are those of the first time.",
            ("recording", "how often", "first at s", "what"),
            rows,
            (0, 3),
        )
    ]


def settings(summary: Mapping[str, Any]) -> list[str]:
    rows = [(key.replace("_", " "), _shown(value)) for key, value in summary["settings"].items()]
    compared = summary["commanded_joints"]
    rows.append(("compared with recorded commands", ", ".join(compared) or "no joint"))
    return [html.table("", ("", ""), rows, (0, 1))]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(str(each) for each in value) or "–"
    return "–" if value is None else str(value)
