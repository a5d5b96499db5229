"""`pi05`: the package's command line. A command's module is imported when it is chosen."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from pi05_ros import __version__

COMMANDS = {
    "demo": (
        "pi05_ros.nodes.demo_command",
        "a simulated ALOHA, the policy node, an instruction, motion",
    ),
    "check": (
        "pi05_ros.policy.check_command",
        "what a checkpoint is, and whether it runs with a robot",
    ),
    "record": (
        "pi05_ros.recording.command",
        "demonstrations of the scripted experts as a LeRobot data set or as bags",
    ),
    "dagger": (
        "pi05_ros.evaluation.dagger_command",
        "states that a policy gets itself into, labelled by the experts",
    ),
    "train": ("pi05_ros.training.command", "recordings become a checkpoint"),
    "bench": (
        "pi05_ros.evaluation.bench_command",
        "chunk schedulers by delay; a chunk's time by stage",
    ),
    "evaluate": (
        "pi05_ros.evaluation.offline_command",
        "a policy on recorded bags or data sets, open loop: report and figures",
    ),
    "sim-eval": (
        "pi05_ros.evaluation.closed_loop_command",
        "closed-loop success of a policy in the simulator",
    ),
}
"""Name → module with `add_arguments(parser)` and `run(options) -> exit code`, and a summary."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(
        prog="pi05",
        description="π0.5 on a ROS 2 robot",
        epilog="commands: "
        + "; ".join(f"{name}: {about}" for name, (_, about) in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"pi05_ros {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    name = parser.parse_args(arguments[:1]).command
    module_name, about = COMMANDS[name]
    module = importlib.import_module(module_name)
    command = argparse.ArgumentParser(prog=f"pi05 {name}", description=about)
    module.add_arguments(command)
    return int(module.run(command.parse_args(arguments[1:])))


if __name__ == "__main__":
    raise SystemExit(main())
