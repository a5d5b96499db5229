"""`pi05 check CHECKPOINT`: what a checkpoint is, and whether it runs with a robot."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi05_ros.policy.weights import printable

if TYPE_CHECKING:
    from pi05_ros.policy.check import Report

KIND_NAMES = {"pi05": "π0.5", "pi0": "π0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "checkpoint", help="a folder, a Hugging Face id such as owner/name@revision, or small"
    )
    parser.add_argument(
        "--robot",
        default="aloha",
        help="aloha, droid, libero, ur5e, generic, or a YAML description (default: aloha)",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--no-values", action="store_true", help="don't read the weights to find NaN and infinity"
    )


def run(options: argparse.Namespace) -> int:
    """0 when it would run, 1 when not."""
    from pi05_ros.policy.check import check

    report = check(options.checkpoint, options.robot, values=not options.no_values)
    if options.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        show(report, Console())
    return 0 if report.runs else 1


def show(report: Report, console: Console) -> None:
    """Print tables, warnings and problems."""
    table = Table(title=printable(report.checkpoint), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(report):
        table.add_row(name, Text(value))
    console.print(table)
    if report.dimensions:
        console.print(_statistics(report))
    for warning in map(printable, report.warnings):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for problem in map(printable, report.problems):
        console.print(Text(f"problem: {problem}", style="bold red"), soft_wrap=True)
    count = len(report.problems)
    verdict = (
        f"runs with robot {report.robot}"
        if report.runs
        else f"does not run with robot {report.robot}: {count} problem{'s' * (count > 1)}"
    )
    console.print(Text(verdict, style="green" if report.runs else "bold red"))


def _facts(report: Report) -> list[tuple[str, str]]:
    from pi05_ros.policy.check import human_bytes

    facts: list[tuple[str, str]] = []

    def add(name: str, value: object) -> None:
        if value not in (None, "", [], {}):
            facts.append((name, printable(str(value))))

    add("folder", report.folder)
    add("kind", KIND_NAMES.get(report.kind or "", report.kind))
    if report.parameters:
        add("parameters", f"{report.parameters:,}")
    if report.sizes:
        vlm, expert, vision = (report.sizes[key] for key in ("vlm", "exp", "vis"))
        add("language model", f"{vlm['depth']} layers × {vlm['width']}, MLP {vlm['mlp_dim']}")
        add(
            "action expert",
            f"{expert['depth']} layers × {expert['width']}, MLP {expert['mlp_dim']}",
        )
        side, patch = report.sizes["image"], report.sizes["patch"]
        add(
            "image tower", f"{vision['depth']} layers × {vision['width']}, {side} px, patch {patch}"
        )
    stored = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(report.dtypes.items()))
    if report.file_bytes:
        add("stored", f"{stored}, {human_bytes(report.file_bytes)}")
    add(
        "memory, about",
        ", ".join(f"{key} {human_bytes(count)}" for key, count in report.memory_bytes.items()),
    )
    add("horizon", f"{report.horizon} steps" if report.horizon else None)
    if report.dt_s:
        add("step", f"{report.dt_s * 1000:.1f} ms")
    add("Euler steps", report.num_steps)
    for name, dim, limit in (
        ("state", report.state_dim, report.max_state_dim),
        ("action", report.action_dim, report.max_action_dim),
    ):
        if limit:
            add(name, f"{'?' if dim is None else dim} of at most {limit} values")
    add("processing", {"lerobot": "LeRobot's", "openpi": "openpi's"}.get(report.convention or ""))
    add(
        "normalisation",
        ", ".join(f"{feature} {mode}" for feature, mode in report.normalization.items()),
    )
    matched = any(report.cameras.values())
    add(
        "cameras",
        ", ".join(
            f"{theirs} ← {mine or 'none'}" if matched else theirs
            for theirs, mine in report.cameras.items()
        ),
    )
    add("cameras not used", ", ".join(report.unused_cameras))
    if report.tokenizer:
        room = report.tokenizer["room_for_instruction"]
        add("tokenizer", f"{report.tokenizer['source']}; {room} tokens for the instruction")
    if report.state_in_prompt is not None and report.kind == "pi05":
        add("state", "in the prompt" if report.state_in_prompt else "not used: not in the prompt")
    add("the robot adds", "; ".join(report.conventions))
    return facts


def _statistics(report: Report) -> Table:
    table = Table(title="statistics", title_justify="left")
    table.add_column("value")
    names = list(dict.fromkeys(key for row in report.dimensions for key in row.statistics))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("")
    for row in report.dimensions:
        cells = [f"{row.statistics[n]:.4g}" if n in row.statistics else "" for n in names]
        mark = Text("narrow", style="yellow") if row.warning else ""
        table.add_row(printable(f"{row.feature} {row.name}"), *cells, mark)
    return table
