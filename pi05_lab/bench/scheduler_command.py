"""`pi05 bench scheduler`: schedulers × delays on two tasks.

The obstacle task runs the same on every computer: a point robot and a policy in closed form. The
reaching task runs a policy in the simulated ALOHA.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from pi05_lab.bench import reach, report, toy_task
from pi05_lab.console import make_console, progress_bar, say
from pi05_lab.evaluation.closed_loop.agents import SetupError
from pi05_lab.parallel import WorkerDied
from pi05_lab.sim.rendering import RenderingUnavailable
from pi05_ros.cli import CommandError, one_of

Option = typer.Option


def scheduler(
    task: Annotated[str, Option(
        **one_of(("obstacle", "reach")),
        help="obstacle: minutes; reach: the simulated ALOHA and a policy, half an hour or more.",
    )] = "obstacle",
    checkpoint: Annotated[str, Option(
        help="Of reach: checkpoint folder, 'small' or 'expert'.")] = "small",
    seeds: Annotated[int, Option(min=1, help="Episodes per scheduler and delay.")] = 60,
    first_seed: Annotated[int, Option(min=0, help="Of the episodes' seeds.")] = 0,
    workers: Annotated[int, Option(min=1, help="Processes.", show_default="all cores")] = (
        os.cpu_count() or 1
    ),
    output: Annotated[Path, Option(help="Folder of the results.")] = Path("bench_out"),
) -> int:  # fmt: skip
    """Measure, print and draw; the exit code."""
    console = make_console()
    output.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    seed_range = range(first_seed, first_seed + seeds)
    if task == "reach":
        runs = reach.run_all(checkpoint, seed_range, workers)
        total = seeds * len(reach.METHODS) * len(reach.DELAYS)
        measures, name = report.REACH_MEASURES, "reach"
        description = f"touching a cube in the simulated ALOHA, checkpoint {checkpoint}"
    else:
        runs = toy_task.run_all(seed_range, workers)
        total = len(toy_task.VARIANTS) * len(toy_task.DELAYS)
        measures, name = report.OBSTACLE_MEASURES, "scheduler"
        description = "two ways around an obstacle, flow policy in closed form"
    episodes: list[toy_task.Episode] = []
    try:
        with progress_bar(console, "episodes", total) as advance:
            for found in runs:
                episodes += found
                advance(None)
    except (SetupError, WorkerDied, RenderingUnavailable) as error:
        raise CommandError(str(error)) from error
    elapsed_s = time.monotonic() - started_s
    costs = toy_task.measure_cost()
    results = report.summarise(episodes, measures)
    for table in report.tables(results, measures, costs):
        console.print(table)
    document = {
        "task": description,
        "seeds": seeds,
        "first_seed": first_seed,
        "elapsed_s": elapsed_s,
        "workers": workers,
        "results": results,
        "cost": costs,
    }
    text = json.dumps(document, indent=1, default=vars) + "\n"
    (output / f"{name}_metrics.json").write_text(text, encoding="utf-8")
    (output / f"{name}_tables.md").write_text(report.markdown(results, measures), encoding="utf-8")
    report.draw(results, measures, output, name)
    say(console, f"{len(episodes)} episodes in {elapsed_s:.0f} s; results: {output}")
    return 0
