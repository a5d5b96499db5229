"""A closed-loop evaluation for people and machines: tables, metrics.json, a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Group as Stack
from rich.table import Table

from pi05_lab.evaluation.closed_loop.episode import Outcome
from pi05_lab.evaluation.closed_loop.summary import Rate, Summary
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.rendering import SCENE_CAMERA, CameraRenderer
from pi05_lab.sim.tasks import CUBE_VERBS, Task
from pi05_ros.types import ImageArray

TILE = (200, 150)
LABEL_WIDTH = 130
STRIP = 18
"""Pixels: a picture, the labels on the left, the line of text above each picture."""
_GREY, _GREEN, _RED = (90, 90, 90), (20, 120, 20), (180, 30, 30)


def tables(summary: Summary, header: Mapping[str, Any]) -> Stack:
    """Settings, figures by task, and the controls where they were played."""
    parts = [_header_table(header), _verb_table(summary), _task_table(summary)]
    if summary.verbs("shuffled"):
        parts.append(_control_table(summary))
    return Stack(*parts)


def write_metrics(summary: Summary, header: Mapping[str, Any], path: Path) -> None:
    """Write metrics.json: the header, figures by verb and by task, controls, every episode."""
    document = {
        "header": dict(header),
        "verbs": {verb: summary.group(verb).to_dict() for verb in summary.verbs()},
        "tasks": [
            {**_task_dict(task), **summary.task_group(task).to_dict()} for task in summary.tasks()
        ],
        "controls": {
            condition: {
                verb: summary.group(verb, condition).to_dict()  # type: ignore[arg-type]
                for verb in summary.verbs(condition)  # type: ignore[arg-type]
            }
            for condition in ("shuffled", "black")
        },
        "episodes": [_episode_dict(outcome) for outcome in summary.outcomes],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_contact_sheet(summary: Summary, path: Path) -> ImageArray:
    """Write a PNG: a row per task with start, middle and end of one success and one failure.

    Returns:
        RGB [height, width, 3].

    Raises:
        RenderingUnavailable: no OpenGL on this machine.
        OSError: the file cannot be written.
    """
    sim = SimulatedAloha()
    plain = [each for each in summary.outcomes if each.trial.condition == "plain"]
    with CameraRenderer(sim.model, *TILE) as renderer:
        rows = []
        for task in summary.tasks():
            mine = [each for each in plain if each.trial.task == task]
            done = next((each for each in mine if each.done), None)
            missed = next((each for each in mine if not each.done), None)
            rate = summary.task_group(task).success
            label = _tile((LABEL_WIDTH, TILE[1] + STRIP))
            words = [task.verb, task.color or "", task.side or "", f"{rate.count}/{rate.of}"]
            for k, word in enumerate(filter(None, words)):
                _write(label, word, (8, 40 + 26 * k), scale=0.6)
            strips = [_strip(renderer, done, "done"), _strip(renderer, missed, "missed")]
            rows.append(np.hstack([label, *strips]))
    sheet = np.ascontiguousarray(np.vstack(rows))
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path} cannot be written")
    return sheet


def _strip(renderer: CameraRenderer, outcome: Outcome | None, kind: str) -> ImageArray:
    """[TILE height + STRIP, 3 × TILE width, 3]."""
    width, height = TILE
    strip = _tile((3 * width, height + STRIP))
    if outcome is None:
        _write(strip, f"none {kind}", (8, 13), _GREY)
        return strip
    for k, scene in enumerate(outcome.scenes):
        picture = renderer.render(np.array(scene), SCENE_CAMERA)
        strip[STRIP:, k * width : (k + 1) * width - 2] = picture[:, :-2]
    seconds = outcome.duration_s if outcome.done_at_s is None else outcome.done_at_s
    notes = [f"{kind} {seconds:.1f} s", f'"{outcome.trial.instruction}"']
    notes += ["WRONG CUBE"] * outcome.wrong_object + ["WRONG ARM"] * outcome.wrong_arm
    _write(strip, "  ".join(notes), (8, 13), _GREEN if outcome.done else _RED)
    return strip


def _tile(size: tuple[int, int]) -> ImageArray:
    return np.full((size[1], size[0], 3), 255, dtype=np.uint8)


def _write(
    picture: ImageArray,
    text: str,
    origin: tuple[int, int],
    color: tuple[int, int, int] = (0, 0, 0),
    scale: float = 0.42,
) -> None:
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(picture, text, origin, font, scale, color, 1, cv2.LINE_AA)


def _header_table(header: Mapping[str, Any]) -> Table:
    table = Table(title="Closed loop in the simulator", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in header.items():
        table.add_row(name.replace("_", " "), str(value))
    return table


def _verb_table(summary: Summary) -> Table:
    table = Table(title="By task: % with 95 % Wilson intervals", title_justify="left")
    table.add_column("task", no_wrap=True)
    for heading in ("done", "success", "wrong cube", "wrong arm", "time s", "clamped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for verb in summary.verbs():
        group = summary.group(verb)
        table.add_row(
            verb,
            f"{group.success.count}/{group.success.of}",
            _percent(group.success),
            _percent(group.wrong_object) if verb in CUBE_VERBS else "",
            _percent(group.wrong_arm) if verb != "home" else "",
            "–" if group.median_s is None else f"{group.median_s:.2f}",
            f"{100 * sum(group.clamps.values()) / group.commands:.1f} %",
        )
    table.caption = (
        "time s: simulated, to success, median; clamped: of joints × ticks, by any limit"
    )
    return table


def _task_table(summary: Summary) -> Table:
    table = Table(title="Done, by arm and cube", title_justify="left")
    tasks = summary.tasks()
    colors = list(dict.fromkeys(task.color for task in tasks))
    table.add_column("task")
    for color in colors:
        table.add_column(color or "no cube", justify="right")
    for verb, side in dict.fromkeys((task.verb, task.side) for task in tasks):
        cells = []
        for color in colors:
            found = [t for t in tasks if (t.verb, t.side, t.color) == (verb, side, color)]
            rate = summary.task_group(found[0]).success if found else None
            cells.append("" if rate is None else f"{rate.count}/{rate.of}")
        table.add_row(" ".join(filter(None, (verb, side))), *cells)
    return table


def _control_table(summary: Summary) -> Table:
    table = Table(title="Controls: success at the same places", title_justify="left")
    table.add_column("task", no_wrap=True)
    for heading in ("other text", "did that", "listens", "black pictures", "looks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for verb in summary.verbs():
        shuffled = summary.group(verb, "shuffled")
        black = summary.group(verb, "black").success
        table.add_row(
            verb,
            _percent(shuffled.success),
            f"{100 * shuffled.told.share:.0f}",
            _verdict(summary.listens(verb)),
            _percent(black) if black.of else "",
            _verdict(summary.looks(verb)),
        )
    table.caption = (
        "other text: told another task; did that: the other task; yes: the interval lies below "
        "the one without the control"
    )
    return table


def _verdict(shown: bool | None) -> str:
    return {None: "", True: "[green]yes[/]", False: "[red]not shown[/]"}[shown]


def _percent(rate: Rate) -> str:
    interval = rate.interval
    if interval is None:
        return "–"
    return f"{100 * rate.share:.0f} ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"


def _task_dict(task: Task) -> dict[str, str | None]:
    return {"verb": task.verb, "side": task.side, "color": task.color}


def _episode_dict(outcome: Outcome) -> dict[str, Any]:
    trial = outcome.trial
    return {
        **_task_dict(trial.task),
        "number": trial.number,
        "condition": trial.condition,
        "instruction": trial.instruction,
        "start": outcome.start,
        "done_at_s": outcome.done_at_s,
        "told_done_at_s": outcome.told_done_at_s,
        "wrong_object": outcome.wrong_object,
        "wrong_arm": outcome.wrong_arm,
        "duration_s": outcome.duration_s,
        "inferences": outcome.inferences,
        "error": outcome.error,
    }
