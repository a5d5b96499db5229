"""`pi05 sim-eval`: a policy does tasks in the simulator, and the figures are counted."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pi05_ros.control.scheduler import SCHEDULERS

if TYPE_CHECKING:
    from pi05_lab.evaluation.closed_loop.episode import Settings
    from pi05_lab.evaluation.closed_loop.summary import Summary
    from pi05_ros.robot_config import RobotConfig

# as in sim, which is not imported for the help alone
VERBS = ("touch", "pick", "place", "wave", "home")
COLORS = ("red", "green", "blue")
SIDES = ("left", "right")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--checkpoint",
        default="small",
        help="folder, 'small' (the embedded policy) or 'expert' (the scripted one; default: small)",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=VERBS, default=VERBS, help="default: all of them"
    )
    parser.add_argument("--colors", nargs="+", choices=COLORS, default=COLORS, help="default: all")
    parser.add_argument("--arms", nargs="+", choices=SIDES, default=SIDES, help="default: both")
    count = parser.add_mutually_exclusive_group()
    count.add_argument(
        "--episodes",
        type=_at_least(1),
        default=5,
        help="for each task, color and arm (default: 5)",
    )
    count.add_argument(
        "--per-task",
        type=_at_least(1),
        help="for each task, spread over colors and arms, instead",
    )
    parser.add_argument(
        "--wordings",
        choices=("held-out", "training"),
        default="held-out",
        help="instructions that no training sees, or those that it does (default: held-out)",
    )
    parser.add_argument(
        "--delay-ms",
        type=_at_least(0),
        default=160,
        help="simulated time from a picture to its usable chunk (default: 160)",
    )
    parser.add_argument(
        "--replan",
        type=_at_least(0),
        default=0,
        metavar="TICKS",
        help="control ticks between inferences; 0: as the params say, when free (default: 0)",
    )
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="how chunks become one motion (default: the params')",
    )
    parser.add_argument(
        "--controls", action="store_true", help="once more with other instructions, black pictures"
    )
    parser.add_argument(
        "--limit-s", type=_seconds, default=10.0, help="of simulated time per task (default: 10)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of places and noise")
    parser.add_argument("--workers", type=_at_least(1), default=1, help="processes (default: 1)")
    parser.add_argument("--device", default="cpu", help="of the network (default: cpu)")
    parser.add_argument("--num-steps", type=_at_least(1), help="Euler steps of the flow")
    parser.add_argument(
        "--size",
        nargs=2,
        type=_at_least(16),
        metavar=("WIDTH", "HEIGHT"),
        help="of the pictures, pixels (default: 4:3, as wide as the policy's)",
    )
    parser.add_argument("--params-file", help="the robot's params file (default: aloha.yaml)")
    parser.add_argument("--urdf", help="the robot's URDF, where limits.source is urdf")
    parser.add_argument(
        "--output", type=Path, default=Path("sim_eval_out"), help="folder of the results"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave the contact sheet out")


def run(options: argparse.Namespace) -> int:
    """Evaluate and report; the exit code."""
    console = Console()
    try:
        from pi05_lab.evaluation.closed_loop.agents import EXPERT
        from pi05_lab.evaluation.closed_loop.episode import Settings, SetupError
        from pi05_lab.evaluation.closed_loop.report import (
            tables,
            write_contact_sheet,
            write_metrics,
        )
        from pi05_lab.evaluation.closed_loop.trial_pool import WorkerDied
        from pi05_lab.sim.rendering import RenderingUnavailable
        from pi05_ros.robot_config import RobotConfigError, read_robot_config
    except ModuleNotFoundError as error:
        if error.name != "mujoco":
            raise
        return _fail(console, "the simulator needs mujoco: pip install 'pi05_ros[sim]'")
    faults: tuple[type[Exception], ...] = (
        RobotConfigError,
        SetupError,
        WorkerDied,
        RenderingUnavailable,
        OSError,
    )
    if options.checkpoint != EXPERT:
        from pi05_ros.policy.weights import CheckpointError

        faults += (CheckpointError,)
    try:
        robot = read_robot_config(options.params_file, options.urdf)
        if options.scheduler:
            robot = replace(robot, scheduler=replace(robot.scheduler, method=options.scheduler))
        settings = Settings(options.delay_ms / 1e3, options.replan, options.limit_s)
        options.output.mkdir(parents=True, exist_ok=True)
        summary, header = _evaluate(options, robot, settings, console)
        console.print(tables(summary, header))
        write_metrics(summary, header, options.output / "metrics.json")
        if not options.no_pictures:
            write_contact_sheet(summary, options.output / "contact_sheet.png")
    except faults as error:
        return _fail(console, str(error))
    _say_errors(summary, console)
    console.print(f"{options.output}: metrics.json and pictures", markup=False, highlight=False)
    return 0


def _evaluate(
    options: argparse.Namespace, robot: RobotConfig, settings: Settings, console: Console
) -> tuple[Summary, dict[str, Any]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from pi05_lab.evaluation.closed_loop.agents import make_agent
    from pi05_lab.evaluation.closed_loop.episode import Outcome
    from pi05_lab.evaluation.closed_loop.summary import evaluate_agent
    from pi05_lab.evaluation.closed_loop.trials import chosen_tasks, spread

    make = partial(
        make_agent,
        options.checkpoint,
        size_px=tuple(options.size) if options.size else None,
        num_steps=options.num_steps,
        device=options.device,
    )
    agent = make()
    description = agent.policy.description
    # one process plays with the agent that is there; several load their own
    play = (lambda: agent) if options.workers == 1 else make
    agent.close()
    tasks = chosen_tasks(options.tasks, options.colors, options.arms)
    if options.per_task:
        counted = spread(tasks, options.per_task)
    else:
        counted = [(task, options.episodes) for task in tasks]
    begin_s = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("episodes", total=None)

        def count(outcome: Outcome, total: int) -> None:
            trial = outcome.trial
            progress.update(
                bar, advance=1, total=total, description=f"{trial.condition} {trial.task.verb}"
            )

        summary = evaluate_agent(
            play,
            counted,
            options.seed,
            robot=robot,
            settings=settings,
            held_out=options.wordings == "held-out",
            controls=options.controls,
            workers=options.workers,
            on_outcome=count,
        )
    wall_s = time.monotonic() - begin_s
    simulated_s = sum(outcome.duration_s for outcome in summary.outcomes)
    replan = (
        f"every {settings.replan_ticks} ticks" if settings.replan_ticks else robot.scheduler.replan
    )
    header = {
        "policy": description,
        "checkpoint": options.checkpoint,
        "scheduler": robot.scheduler.method,
        "delay_ms": options.delay_ms,
        "replanning": replan,
        "wordings": options.wordings,
        "seed": options.seed,
        "limit_s": settings.limit_s,
        "episodes": len(summary.outcomes),
        "faults": (
            f"{sum(outcome.failures for outcome in summary.outcomes)} inferences without a chunk, "
            f"{sum(outcome.rejected for outcome in summary.outcomes)} refused trajectories"
        ),
        "speed": (
            f"{60 * len(summary.outcomes) / wall_s:.0f} episodes/min with {options.workers} "
            f"process(es), {simulated_s / wall_s:.1f} times real time"
        ),
    }
    return summary, header


def _say_errors(summary: Summary, console: Console) -> None:
    errors = [outcome.error for outcome in summary.outcomes if outcome.error]
    if errors:
        console.print(
            f"{len(errors)} episodes with failures, the last: {errors[-1]}",
            style="bold red",
            markup=False,
            highlight=False,
        )


def _fail(console: Console, text: str) -> int:
    console.print(text, style="bold red", markup=False, highlight=False)
    return 1


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return value

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.5 <= value <= 600.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0.5 to 600 seconds")
    return value
