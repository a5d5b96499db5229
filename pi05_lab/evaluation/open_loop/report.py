"""report.html: one file, nothing from a network, the verdict on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pi05_lab.evaluation.open_loop import format as show
from pi05_lab.evaluation.open_loop import html as html
from pi05_lab.evaluation.open_loop import report_tables as tables
from pi05_lab.evaluation.open_loop.plots import course_plot, horizon_plot, joint_plot
from pi05_lab.evaluation.open_loop.verdict import overview, verdicts
from pi05_ros.types import JointGroup

MAX_DRAWN = 3
"""Recordings with plots of every joint: the worst, the middle one, the best."""
_CONDITIONS = {
    "policy": "the policy",
    "hold": "standing still",
    "linear": "same speed on",
    "random": "a random pose",
    "plain": "the policy, where controls were made",
    "shuffled": "… another instruction",
    "black": "… all pictures black",
}
_LIMITS = ("position", "velocity", "acceleration")
_BASELINES = ("standing still", "same speed on", "a random pose")


def render(
    summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]], joints: JointGroup
) -> str:
    """The page.

    Args:
        summary: of `summarize`.
        results: of `OfflineEvaluation.run`.
        joints: of the robot.
    """
    parts = ["<h1>Offline evaluation</h1>", html.paragraph(overview(summary))]
    parts += [
        html.card(v.grade, f"{v.policy}: {_described(summary, v.policy)}", v.headline, v.details)
        for v in verdicts(summary)
    ]
    parts.append(
        html.paragraph(
            "Open loop: the policy sees what the robot saw, and what it would do is compared with "
            "what was done. It is no proof that it can do the task: a mistake that leads to "
            "another one does not show here.",
            "muted",
        )
    )
    sections = [
        ("errors", "Errors", _errors(summary)),
        ("motion", "Schedulers, smoothness and limits", _motion(summary)),
        ("course", "Recordings and joints", _recordings(summary, results, joints)),
        ("worst", "Worst moments", _worst(summary, results)),
        ("latency", "Latency", tables.latency(summary)),
        ("streams", "Streams", tables.streams(summary)),
        ("dropped", "What was dropped", tables.dropped(summary)),
        ("settings", "Settings", tables.settings(summary)),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    parts.append(f"<nav>{links}</nav>")
    for anchor, title, content in sections:
        parts += [html.heading(title, anchor), *content]
    return html.page("Offline evaluation: " + ", ".join(summary["policies"]), parts)


def _errors(summary: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, policy in summary["policies"].items():
        rows = []
        for condition, figures in policy["conditions"].items():
            label = _CONDITIONS.get(
                condition, "… " + condition.replace("black:", "black ") + " alone"
            )
            gripper = figures["gripper"]
            rows.append(
                (
                    label,
                    str(figures["chunks"]),
                    show.number(figures["mae_rad"]),
                    show.span(figures["mae_rad_95"]),
                    show.number(figures["rmse_rad"]),
                    show.percent(figures["mae_share"]),
                    show.change(figures["change"]),
                    show.number(gripper["f1"], 2),
                    show.milliseconds(gripper["offset_s"]),
                    show.number(figures.get("moves_plan_rad")),
                )
            )
        parts += [
            html.subheading(name),
            html.table(
                "Chunks against what was done; means over the arms' joints. % of range: of the "
                "joint's q99 − q01 in the recordings. Change: of the error, against standing still "
                "or, for the controls, against the policy, with the interval over episodes. "
                "F1: openings and closings of grippers, by chunk, within 0.25 s; late: their mean "
                "delay.",
                ("", "chunks", "MAE rad", "95 %", "RMSE rad", "% of range", "change", "gripper F1",
                 "late ms", "plan moves rad"),
                rows,
                references=_BASELINES,
            ),
        ]  # fmt: skip
        if any(
            v is not None for v in policy["conditions"].get("policy", {}).get("by_step_rad", ())
        ):
            alt = f"Error of {name} against the time ahead"
            parts.append(html.picture(horizon_plot(policy), alt))
        parts.append(_joint_table(policy))
    return parts


def _joint_table(policy: Mapping[str, Any]) -> str:
    rows = []
    for joint, figures in policy["joints"].items():
        ratio = None
        if figures["hold_mae"] and figures["range"]:
            ratio = figures["mae"] / figures["hold_mae"]
        rows.append(
            (
                joint,
                figures["unit"],
                show.number(figures["range"], 4),
                show.number(figures["mae"], 4),
                show.number(figures["rmse"], 4),
                show.percent(figures["mae_share"]),
                show.number(figures["hold_mae"], 4),
                "–" if ratio is None else f"{ratio:.2f}",
            )
        )
    return html.table(
        "By joint; – for one that hardly moved. Below 1 in the last column the policy is nearer "
        "than standing still.",
        ("joint", "unit", "q99 − q01", "MAE", "RMSE", "% of range", "standing still", "ratio"),
        rows,
        (0, 1),
    )


def _motion(summary: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, policy in summary["policies"].items():
        for method, figures in policy["schedulers"].items():
            seams = figures["seam_rad"] or [None, None, None]
            clamped = figures["clamped"]
            chunks = figures["chunks"]
            unused = sum(v for k, v in chunks.items() if k.startswith("dropped"))
            rows.append(
                (
                    f"{name}, {method}",
                    show.number(figures["executed_mae_rad"]),
                    *(show.number(seam) for seam in seams),
                    show.number(figures["rms_jerk"], 1),
                    show.number(figures["ldlj"], 2),
                    show.number(figures["sparc"], 2),
                    *(
                        show.percent(clamped.get(k))
                        for k in ("position", "velocity", "acceleration")
                    ),
                    f"{unused}/{chunks.get('received', 0)}",
                )
            )
    recorded = summary["recorded_motion"]
    rows.append(
        (
            "as recorded", "", "", "", "",
            show.number(recorded["rms_jerk"], 1), show.number(recorded["ldlj"], 2),
            show.number(recorded["sparc"], 2), "", "", "", "",
        )
    )  # fmt: skip
    delay_ms = 1e3 * summary["settings"].get("delay_s", 0.0)
    return [
        html.table(
            f"What the schedulers make of the chunks, {delay_ms:.0f} ms after each observation, "
            "behind the limits of the params file. Seam: change of the target where a chunk "
            "arrives, of the joint that changes most. LDLJ and SPARC: nearer to 0 is smoother. "
            "As recorded: the commands, where they come at the control rate; measured positions "
            "carry the encoders' steps, and sparse set-points corners. "
            "Clamped: share of joints × ticks in which a limit gave less than was asked for.",
            ("", "MAE rad", "seam p50", "p95", "max rad", "RMS jerk rad/s³", "LDLJ", "SPARC",
             "position", "velocity", "acceleration", "chunks unused"),
            rows,
            references=("as recorded",),
        )
    ]  # fmt: skip


def _recordings(
    summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]], joints: JointGroup
) -> list[str]:
    names = list(summary["policies"])
    rows = []
    for each in summary["recordings"]:
        errors = [show.number(each["mae_rad"].get(name, {}).get("policy")) for name in names]
        holds = [e["hold"] for e in each["mae_rad"].values()]
        rows.append(
            (
                each["name"],
                f"{each['duration_s']:.1f}",
                f"{each['observations']}/{each['moments']}",
                *errors,
                show.number(holds[0] if holds else None),
                "; ".join(dict.fromkeys(each["instructions"])),
            )
        )
    parts = [
        html.table(
            "Each recording; MAE in rad.",
            ("recording", "s", "observations", *names, "standing still", "instructions"),
            rows,
            (0, 4 + len(names)),
        )
    ]
    for result in _chosen(summary, results):
        parts.append(html.subheading(result["name"]))
        errors_of = {name: p["traces"]["errors"] for name, p in result["policies"].items()}
        parts.append(html.picture(course_plot(errors_of), f"Error over {result['name']}"))
        for name, policy in result["policies"].items():
            if policy["traces"]["times_s"] or policy["traces"]["chunks"]:
                alt = f"Joints of {result['name']}: recorded and predicted by {name}"
                parts.append(html.paragraph(name, "muted"))
                parts.append(html.picture(joint_plot(policy["traces"], joints), alt))
    return parts


def _chosen(
    summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The recordings that are drawn, the worst first by the first policy's error."""

    def error(index: int) -> float:
        errors = [e["policy"] for e in summary["recordings"][index]["mae_rad"].values()]
        return next((value for value in errors if value is not None), -1.0)

    order = sorted(range(len(results)), key=error, reverse=True)
    if len(order) > MAX_DRAWN:
        order = [order[0], order[len(order) // 2], order[-1]]
    return [results[index] for index in order]


def _worst(summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[str]:
    count = summary["settings"].get("worst", MAX_DRAWN)
    parts = []
    for name, policy in summary["policies"].items():
        moments = [
            (result["name"], moment)
            for result in results
            for moment in result["policies"].get(name, {}).get("worst", ())
        ]
        moments.sort(key=lambda each: -each[1]["error"])
        reach_s = (policy["horizon"] - 1) * policy["dt_s"]
        for recording, moment in moments[:count]:
            parts.append(
                html.subheading(
                    f"{name}: {recording}, {moment['stamp_s']:.2f} s, off by "
                    f"{moment['error']:.3f} rad (standing still {moment['hold']:.3f})"
                )
            )
            parts.append(html.paragraph(f"“{moment['instruction']}”", "muted"))
            for key, when in (("before", "what it saw"), ("after", f"{reach_s:.1f} s later")):
                images = [(f"{camera}, {when}", data) for camera, data in moment[key].items()]
                if images:
                    parts.append(html.strip(images))
    return parts or [html.paragraph("None: nothing was compared.")]


def _described(summary: Mapping[str, Any], name: str) -> str:
    return str(summary["policies"][name]["description"])
