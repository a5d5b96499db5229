"""Report of a closed-loop evaluation: console tables, metrics.json, a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Group as Stack
from rich.table import Table

from pi05_lab.console import make_table
from pi05_lab.evaluation.closed_loop.episode import Outcome
from pi05_lab.evaluation.closed_loop.summary import Rate, Summary
from pi05_lab.evaluation.closed_loop.trials import CONDITIONS
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.rendering import SCENE_CAMERA, CameraRenderer
from pi05_lab.sim.tasks import CUBE_VERBS, Task
from pi05_ros.types import ImageArray

TILE = (200, 150)
LABEL_WIDTH = 130
STRIP = 18
"""Pixels: an image, the labels on the left, the line of text above each image."""
_GREY, _GREEN, _RED = (90, 90, 90), (20, 120, 20), (180, 30, 30)


def tables(summary: Summary, header: Mapping[str, Any]) -> Stack:
    """Settings, figures by task, and the ablations if they were run."""
    parts = [_header_table(header), _verb_table(summary), _task_table(summary)]
    if summary.verbs("shuffled"):
        parts.append(_ablation_table(summary))
    return Stack(*parts)


def write_metrics(summary: Summary, header: Mapping[str, Any], path: Path) -> None:
    """Write metrics.json: header, figures by verb and by task, ablations, every episode."""
    document = {
        "header": header,
        "verbs": {verb: summary.group(verb).to_dict() for verb in summary.verbs()},
        "tasks": [
            {**_task_dict(task), **summary.group(task).to_dict()} for task in summary.tasks()
        ],
        "controls": {
            condition: {
                verb: summary.group(verb, condition).to_dict() for verb in summary.verbs(condition)
            }
            for condition in CONDITIONS[1:]
        },
        "episodes": [_episode_dict(outcome) for outcome in summary.outcomes],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_contact_sheet(summary: Summary, path: Path) -> None:
    """Write a PNG: a row per task with start, middle and end of one success and one failure."""
    plain = [each for each in summary.outcomes if each.trial.condition == "plain"]
    with CameraRenderer(SimulatedAloha().model, *TILE) as renderer:
        rows = []
        for task in summary.tasks():
            outcomes = [each for each in plain if each.trial.task == task]
            done = next((each for each in outcomes if each.done), None)
            missed = next((each for each in outcomes if not each.done), None)
            rate = summary.group(task).success
            label = _white(LABEL_WIDTH)
            words = [task.verb, task.color or "", task.side or "", f"{rate.count}/{rate.of}"]
            for k, word in enumerate(filter(None, words)):
                _write(label, word, (8, 40 + 26 * k), scale=0.6)
            strips = [_strip(renderer, done, "done"), _strip(renderer, missed, "missed")]
            rows.append(np.hstack([label, *strips]))
    sheet = np.ascontiguousarray(np.vstack(rows))
    if not cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path} cannot be written")


def _strip(renderer: CameraRenderer, outcome: Outcome | None, kind: str) -> ImageArray:
    """[TILE height + STRIP, 3 × TILE width, 3]."""
    width = TILE[0]
    strip = _white(3 * width)
    if outcome is None:
        _write(strip, f"none {kind}", (8, 13), _GREY)
        return strip
    for k, scene in enumerate(outcome.scenes):
        image = renderer.render(np.array(scene), SCENE_CAMERA)
        strip[STRIP:, k * width : (k + 1) * width - 2] = image[:, :-2]
    seconds = outcome.duration_s if outcome.done_at_s is None else outcome.done_at_s
    notes = [f"{kind} {seconds:.1f} s", f'"{outcome.trial.instruction}"']
    notes += ["WRONG CUBE"] * outcome.wrong_object + ["WRONG ARM"] * outcome.wrong_arm
    _write(strip, "  ".join(notes), (8, 13), _GREEN if outcome.done else _RED)
    return strip


def _white(width: int) -> ImageArray:
    return np.full((TILE[1] + STRIP, width, 3), 255, dtype=np.uint8)


def _write(
    image: ImageArray,
    text: str,
    origin: tuple[int, int],
    color: tuple[int, int, int] = (0, 0, 0),
    scale: float = 0.42,
) -> None:
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(image, text, origin, font, scale, color, 1, cv2.LINE_AA)


def _header_table(header: Mapping[str, Any]) -> Table:
    table = Table(title="Closed loop in the simulator", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in header.items():
        table.add_row(name.replace("_", " "), str(value))
    return table


def _verb_table(summary: Summary) -> Table:
    rows = []
    for verb in summary.verbs():
        group = summary.group(verb)
        done = f"{group.success.count}/{group.success.of}"
        wrong_cube = _percent(group.wrong_object) if verb in CUBE_VERBS else ""
        wrong_arm = _percent(group.wrong_arm) if verb != "home" else ""
        time_s = "–" if group.median_s is None else f"{group.median_s:.2f}"
        clamped = f"{100 * sum(group.clamps.values()) / group.commands:.1f} %"
        rows.append((verb, done, _percent(group.success), wrong_cube, wrong_arm, time_s, clamped))
    return make_table(
        ("task", "done", "success", "wrong cube", "wrong arm", "time s", "clamped"),
        rows,
        "By task: % with 95 % Wilson intervals",
        "time s: simulated, to success, median; clamped: of joints × ticks, by any limit",
    )


def _task_table(summary: Summary) -> Table:
    tasks = summary.tasks()
    colors = list(dict.fromkeys(task.color for task in tasks))
    cells = {}
    for task in tasks:
        rate = summary.group(task).success
        cells[task.verb, task.side, task.color] = f"{rate.count}/{rate.of}"
    rows = [
        (f"{verb} {side or ''}", *(cells.get((verb, side, color), "") for color in colors))
        for verb, side in dict.fromkeys((task.verb, task.side) for task in tasks)
    ]
    headers = ["task", *(color or "no cube" for color in colors)]
    return make_table(headers, rows, "Done, by arm and cube")


def _ablation_table(summary: Summary) -> Table:
    verdicts = {None: "", True: "[green]yes[/]", False: "[red]not shown[/]"}
    rows = []
    for verb in summary.verbs():
        shuffled, black = (summary.group(verb, condition) for condition in CONDITIONS[1:])
        language, vision = (summary.lowers_success(each, verb) for each in CONDITIONS[1:])
        told = f"{100 * shuffled.instructed.share:.0f}"
        dark = _percent(black.success) if black.success.of else ""
        cells = (_percent(shuffled.success), told, verdicts[language], dark, verdicts[vision])
        rows.append((verb, *cells))
    return make_table(
        ("task", "wrong instruction", "its task", "language", "black images", "vision"),
        rows,
        "Ablations: success at the same places",
        "wrong instruction: that of another task; its task: success at that one; language, "
        "vision: yes if the ablation's interval lies below the baseline's",
    )


def _percent(rate: Rate) -> str:
    if rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.share:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _task_dict(task: Task) -> dict[str, str | None]:
    return {"verb": task.verb, "side": task.side, "color": task.color}


def _episode_dict(outcome: Outcome) -> dict[str, Any]:
    of_outcome = ("wrong_object", "wrong_arm", "duration_s", "inferences", "error")
    return {
        **_task_dict(outcome.trial.task),
        **{name: getattr(outcome.trial, name) for name in ("number", "condition", "instruction")},
        "start": outcome.start,
        "done_at_s": outcome.done_at_s,
        "told_done_at_s": outcome.instructed_done_at_s,
        **{name: getattr(outcome, name) for name in of_outcome},
    }
