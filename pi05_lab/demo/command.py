"""`pi05 demo`: options, and the environment that ROS needs before rclpy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi05_lab.console import make_console, say
from pi05_lab.demo.ros_domain import NoFreeDomain, use_own_domain
from pi05_ros.cli import CommandError
from pi05_ros.nodes.main import params_file_fault, prepare

Option = typer.Option
DEFAULT_INSTRUCTIONS = (
    ("touch the red cube with the left arm", 4.0),
    ("touch the blue cube with the right arm", 0.8),
    ("touch the green cube with the right arm", 4.0),
)
"""Instruction and seconds; the second one is changed in mid-motion."""


def _instructions(texts: list[str] | None) -> list[str] | None:
    if any(not text.strip() for text in texts or ()):
        raise typer.BadParameter("an instruction must not be empty")
    return texts


def _seconds(value: float) -> float:
    if not 1.0 <= value <= 600.0:
        raise typer.BadParameter(f"'{value:g}' is not a time from 1 to 600 seconds")
    return value


def demo(
    instruction: Annotated[list[str] | None, Option(
        metavar="TEXT", callback=_instructions, help="May be repeated.",
        show_default="three in turn, the second of which is changed in mid-motion")] = None,
    seconds: Annotated[float, Option(
        callback=_seconds, help="For each --instruction.")] = 6.0,
    output: Annotated[Path, Option(help="Folder of the results.")] = Path("demo_out"),
    checkpoint: Annotated[str, Option(
        help="Checkpoint folder.", show_default="the params file's")] = "",
    params_file: Annotated[str, Option(help="Params file.", show_default="aloha.yaml")] = "",
    bag: Annotated[bool, Option("--bag", help="Record a bag for `pi05 evaluate`.")] = False,
    domain: Annotated[int | None, Option(
        min=0, max=232, metavar="N", show_default="a free one",
        help="ROS domain, for other tools. ROS_DOMAIN_ID is ignored: it may be a robot's.",
    )] = None,
    no_video: Annotated[bool, Option("--no-video", help="Omit the video.")] = False,
) -> int:  # fmt: skip
    """Run the demo; the exit code."""
    fault = params_file_fault(params_file) if params_file else ""
    if fault:
        raise CommandError(f"--params-file: {fault}")
    try:
        chosen = use_own_domain(domain)
    except NoFreeDomain as error:
        raise CommandError(f"{error}, with --domain") from error
    prepare()
    console = make_console()
    say(console, f"ROS domain {chosen}, on this machine alone")
    from pi05_lab.demo.demo import run_demo

    given = [(text, seconds) for text in instruction or ()] or DEFAULT_INSTRUCTIONS
    return run_demo(console, given, output, checkpoint, params_file, not no_video, bag)
