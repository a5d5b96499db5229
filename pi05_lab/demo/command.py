"""Arguments of `pi05 demo`, checked before anything starts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console

THREE_IN_TURN = (
    ("touch the red cube with the left arm", 4.0),
    ("touch the blue cube with the right arm", 0.8),
    ("touch the green cube with the right arm", 4.0),
)
"""Instruction and seconds; the second one is changed in mid-motion."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--instruction",
        action="append",
        metavar="TEXT",
        type=_instruction,
        help="what the robot is asked to do; may be repeated "
        "(default: three in turn, the second of which is changed in mid-motion)",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=6.0, help="for each --instruction (default: 6)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_out"), help="folder of the results"
    )
    parser.add_argument("--checkpoint", default="", help="checkpoint folder (default: the params')")
    parser.add_argument("--params-file", default="", help="params file (default: aloha.yaml)")
    parser.add_argument("--bag", action="store_true", help="record a bag for `pi05 evaluate`")
    parser.add_argument(
        "--domain",
        type=_domain,
        metavar="N",
        help="ROS domain, to watch with other tools; ROS_DOMAIN_ID does not count, it may be a "
        "robot's (default: a free one)",
    )
    parser.add_argument("--no-video", action="store_true", help="leave the video out")


def run(options: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    from pi05_ros.nodes.main import prepare
    from pi05_ros.nodes.params_files import params_file_fault
    from pi05_ros.nodes.ros_domain import NoFreeDomain, use_own_domain

    console = Console()
    fault = params_file_fault(options.params_file) if options.params_file else ""
    if fault:
        _say(console, f"--params-file: {fault}")
        return 1
    try:
        domain = use_own_domain(options.domain)
    except NoFreeDomain as error:
        _say(console, f"{error}, with --domain")
        return 1
    prepare()
    console.print(f"ROS domain {domain}, on this machine alone", highlight=False)
    try:
        from pi05_lab.demo.demo import DemoOptions, run_demo
    except ImportError as error:
        if error.name not in ("mujoco", "matplotlib", "av") and "mujoco" not in str(error):
            raise
        _say(console, f"{error}. The demo needs pi05_ros[sim,eval]")
        return 1
    return run_demo(
        DemoOptions(
            instructions=[(text, options.seconds) for text in options.instruction or ()]
            or THREE_IN_TURN,
            output=options.output,
            checkpoint=options.checkpoint,
            params_file=options.params_file,
            video=not options.no_video,
            bag=options.bag,
        ),
        console,
    )


def _say(console: Console, text: str) -> None:
    console.print(text, style="bold red", markup=False)


def _instruction(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("an instruction must not be empty")
    return text


def _domain(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 232):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ROS domain from 0 to 232")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1.0 <= value <= 600.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 1 to 600 seconds")
    return value
