"""`pi05 bench`: what is to be measured."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = {
    "scheduler": (
        "pi05_ros.evaluation.scheduler_bench_command",
        "chunk schedulers by delay: success, steps, jerk, stalls",
    ),
    "latency": (
        "pi05_ros.policy.latency_command",
        "a chunk's time by stage, in each way to run the network",
    ),
}
"""Name → module with `add_arguments` and `run`, and a summary."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for name, (module, about) in BENCHMARKS.items():
        own = benchmarks.add_parser(name, help=about, description=about)
        importlib.import_module(module).add_arguments(own)


def run(options: argparse.Namespace) -> int:
    """Measure; the exit code."""
    module, _ = BENCHMARKS[options.benchmark]
    return int(importlib.import_module(module).run(options))
