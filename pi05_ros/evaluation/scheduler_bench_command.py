"""`pi05 bench scheduler`: methods × delays on a task that every computer runs the same way."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("what", choices=["scheduler"], help="what to measure")
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
        from pi05_ros.evaluation import scheduler_bench, scheduler_bench_report
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is missing: pip install 'pi05_ros[eval]'")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    pairs = len(scheduler_bench.VARIANTS) * len(scheduler_bench.DELAYS)
    episodes = []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = scheduler_bench.run_all(seeds, options.workers)
    for found in track(runs, "methods × delays", total=pairs, console=console):
        episodes += found
    elapsed_s = time.monotonic() - began_s
    costs = scheduler_bench.measure_cost()
    for variant, delays in scheduler_bench_report.group(episodes).items():
        console.print(scheduler_bench_report.table(variant, delays))
    console.print(scheduler_bench_report.cost_table(costs))
    header = {
        "task": "two ways around an obstacle, flow policy in closed form",
        "seeds": options.seeds,
        "first_seed": options.first_seed,
        "elapsed_s": elapsed_s,
        "workers": options.workers,
    }
    scheduler_bench_report.write_metrics(
        episodes, costs, header, options.output / "scheduler_metrics.json"
    )
    keys = [measure.key for measure in scheduler_bench_report.MEASURES]
    (options.output / "scheduler_tables.md").write_text(
        scheduler_bench_report.markdown(episodes, keys), encoding="utf-8"
    )
    scheduler_bench_report.draw(episodes, options.output)
    console.print(f"{len(episodes)} episodes in {elapsed_s:.0f} s; results: {options.output}")
    return 0
