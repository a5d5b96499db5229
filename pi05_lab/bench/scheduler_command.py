"""`pi05 bench scheduler`: methods × delays on two tasks.

The first is one that every computer runs the same way: a point robot, an obstacle, a policy in
closed form. The second is reaching in the simulated ALOHA with a real policy.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

if TYPE_CHECKING:
    from pi05_lab.bench.toy_task import Episode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--task",
        choices=["obstacle", "reach"],
        default="obstacle",
        help="obstacle: minutes; reach: the simulated ALOHA and a policy, half an hour and more "
        "(default: obstacle)",
    )
    parser.add_argument(
        "--checkpoint", default="small", help="reach: checkpoint folder, or 'small' (default)"
    )
    parser.add_argument("--seeds", type=int, default=60, help="episodes per pair (default: 60)")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="of the episodes' seeds (default: 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="results' folder")


def run(options: argparse.Namespace) -> int:
    """Measure, print and draw; the exit code."""
    console = Console()
    if options.seeds < 1 or options.workers < 1 or options.first_seed < 0:
        console.print("[red]--seeds and --workers must be at least 1, --first-seed at least 0")
        return 1
    try:
        from pi05_lab.bench import report as scheduler_bench_report
        from pi05_lab.bench import toy_task as scheduler_bench
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is missing: pip install 'pi05_ros[eval]'")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    episodes = (_reach if options.task == "reach" else _obstacle)(options, console)
    elapsed_s = time.monotonic() - began_s
    costs = scheduler_bench.measure_cost()
    if options.task == "reach":
        columns, name = scheduler_bench_report.REACH_MEASURES, "reach"
        description = f"touching a cube in the simulated ALOHA, checkpoint {options.checkpoint}"
    else:
        columns, name = scheduler_bench_report.OBSTACLE_MEASURES, "scheduler"
        description = "two ways around an obstacle, flow policy in closed form"
    for variant, delays in scheduler_bench_report.group(episodes).items():
        console.print(scheduler_bench_report.table(variant, delays, columns))
    console.print(scheduler_bench_report.cost_table(costs))
    header = {
        "task": description,
        "seeds": options.seeds,
        "first_seed": options.first_seed,
        "elapsed_s": elapsed_s,
        "workers": options.workers,
    }
    scheduler_bench_report.write_metrics(
        episodes, columns, costs, header, options.output / f"{name}_metrics.json"
    )
    (options.output / f"{name}_tables.md").write_text(
        scheduler_bench_report.markdown(episodes, columns), encoding="utf-8"
    )
    scheduler_bench_report.draw(episodes, columns, options.output, name)
    console.print(f"{len(episodes)} episodes in {elapsed_s:.0f} s; results: {options.output}")
    return 0


def _obstacle(options: argparse.Namespace, console: Console) -> list[Episode]:
    from pi05_lab.bench import toy_task as scheduler_bench

    pairs = len(scheduler_bench.VARIANTS) * len(scheduler_bench.DELAYS)
    runs = scheduler_bench.run_all(_seeds(options), options.workers)
    episodes = []
    for found in track(runs, "methods × delays", total=pairs, console=console):
        episodes += found
    return episodes


def _reach(options: argparse.Namespace, console: Console) -> list[Episode]:
    from pi05_lab.bench import reach as reach_bench

    total = options.seeds * len(reach_bench.METHODS) * len(reach_bench.DELAYS)
    runs = reach_bench.run_all(options.checkpoint, _seeds(options), options.workers)
    return list(track(runs, "methods × delays × seeds", total=total, console=console))


def _seeds(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)
