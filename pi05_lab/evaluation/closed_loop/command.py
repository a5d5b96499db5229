"""`pi05 sim-eval`: run a policy on tasks in the simulator and report success rates."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pi05_lab.console import make_console, progress_bar, say
from pi05_lab.evaluation.closed_loop.agents import SetupError, make_agent
from pi05_lab.evaluation.closed_loop.episode import Settings
from pi05_lab.evaluation.closed_loop.report import tables, write_contact_sheet, write_metrics
from pi05_lab.evaluation.closed_loop.summary import Summary
from pi05_lab.evaluation.closed_loop.trials import (
    CONDITIONS,
    CUBES,
    chosen_tasks,
    plan_trials,
    play_trials,
    spread,
)  # fmt: skip
from pi05_lab.parallel import WorkerDied
from pi05_lab.sim.rendering import RenderingUnavailable
from pi05_lab.sim.scene import SIDES
from pi05_lab.sim.tasks import VERBS
from pi05_ros.cli import CommandError, one_of
from pi05_ros.control.scheduler import SCHEDULERS
from pi05_ros.robot_config import RobotConfigError, read_robot_config
from pi05_ros.types import HEADS

Option = typer.Option


def sim_eval(
    checkpoint: Annotated[str, Option(
        help="Folder, 'small' (the shipped policy) or 'expert' (the scripted one).")] = "small",
    tasks: Annotated[list[str] | None, Option(**one_of(VERBS), show_default="all")] = None,
    colors: Annotated[list[str] | None, Option(**one_of(CUBES), show_default="all")] = None,
    arms: Annotated[list[str] | None, Option(**one_of(SIDES), show_default="both")] = None,
    episodes: Annotated[int | None, Option(
        min=1, help="For each task, color and arm.", show_default="5")] = None,
    per_task: Annotated[int | None, Option(
        min=1, help="For each task, spread over colors and arms, instead.")] = None,
    wordings: Annotated[str, Option(
        **one_of(("held-out", "training")),
        help="Instructions that no training uses, or those of trainings.")] = "held-out",
    delay_ms: Annotated[int, Option(
        min=0, help="Simulated time from an image to its usable chunk.")] = 160,
    replan: Annotated[int, Option(
        min=0, metavar="TICKS",
        help="Control ticks between inferences; 0: as the params file says.")] = 0,
    scheduler: Annotated[str | None, Option(
        **one_of(SCHEDULERS), help="Chunk scheduler.", show_default="the params file's")] = None,
    controls: Annotated[bool, Option(
        "--controls", help="Also run ablations: wrong instruction, black images.")] = False,
    limit_s: Annotated[float, Option(
        min=0.5, max=600.0, help="Simulated time per episode.")] = 10.0,
    seed: Annotated[int, Option(min=0, help="Of places and noise.")] = 0,
    workers: Annotated[int, Option(min=1, help="Processes.")] = 1,
    device: Annotated[str, Option(help="Of the network.")] = "cpu",
    num_steps: Annotated[int | None, Option(min=1, help="Euler steps of the flow.")] = None,
    head: Annotated[str | None, Option(
        **one_of(HEADS), help="What predicts the actions: the action expert's flow, or the "
        "language model's tokens.", show_default="the checkpoint's")] = None,
    size: Annotated[tuple[int, int] | None, Option(
        metavar="WIDTH HEIGHT", help="Of the images, pixels.",
        show_default="4:3, as wide as the policy's")] = None,
    params_file: Annotated[str | None, Option(
        help="The robot's params file.", show_default="aloha.yaml")] = None,
    urdf: Annotated[str | None, Option(
        help="The robot's URDF, if limits.source is urdf.")] = None,
    output: Annotated[Path, Option(help="Folder of the results.")] = Path("sim_eval_out"),
    no_pictures: Annotated[bool, Option(
        "--no-pictures", help="Omit the contact sheet.")] = False,
) -> int:  # fmt: skip
    """Evaluate and report; the exit code."""
    if episodes is not None and per_task is not None:
        raise typer.BadParameter("--per-task: not allowed with --episodes")
    if size is not None and min(size) < 16:
        raise typer.BadParameter(f"--size: {min(size)} is not a whole number from 16 on")
    if not limit_s >= 0.5:
        raise typer.BadParameter(f"--limit-s: {limit_s} is not a time from 0.5 to 600 seconds")
    console = make_console()
    try:
        robot = read_robot_config(params_file, urdf)
        if scheduler:
            robot = replace(robot, scheduler=replace(robot.scheduler, method=scheduler))
        output.mkdir(parents=True, exist_ok=True)
        make = partial(make_agent, checkpoint, size, num_steps, device, head=head)
        agent = make()
        chosen = chosen_tasks(tasks or VERBS, colors or CUBES, arms or SIDES)
        trials = plan_trials(
            spread(chosen, per_task) if per_task else [(task, episodes or 5) for task in chosen],
            seed,
            held_out=wordings == "held-out",
            conditions=CONDITIONS if controls else CONDITIONS[:1],
        )
        settings = Settings(delay_ms / 1e3, replan, limit_s)
        outcomes = []
        started_s = time.monotonic()
        with progress_bar(console, "episodes", len(trials)) as advance:
            # One process uses the loaded agent, several load their own.
            maker = make if workers > 1 else lambda: agent
            for outcome in play_trials(maker, trials, robot, settings, workers):
                outcomes.append(outcome)
                advance(f"{outcome.trial.condition} {outcome.trial.task.verb}")
        wall_s = time.monotonic() - started_s
        header = {
            "policy": agent.policy.description,
            "checkpoint": checkpoint,
            **({"head": head} if head else {}),
            "scheduler": robot.scheduler.method,
            "delay_ms": delay_ms,
            "replanning": f"every {replan} ticks" if replan else robot.scheduler.replan,
            "wordings": wordings,
            "seed": seed,
            "limit_s": limit_s,
            "episodes": len(outcomes),
            "faults": f"{sum(o.failures for o in outcomes)} inferences without a chunk, "
            f"{sum(o.rejected for o in outcomes)} refused trajectories",
            "speed": f"{60 * len(outcomes) / wall_s:.0f} episodes/min with {workers} process(es), "
            f"{sum(o.duration_s for o in outcomes) / wall_s:.1f} times real time",
        }
        summary = Summary(outcomes, robot)
        console.print(tables(summary, header))
        write_metrics(summary, header, output / "metrics.json")
        if not no_pictures:
            write_contact_sheet(summary, output / "contact_sheet.png")
    except (RobotConfigError, SetupError, WorkerDied, RenderingUnavailable, OSError) as error:
        raise CommandError(str(error)) from error
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        say(console, f"{len(errors)} episodes with failures, the last: {errors[-1]}", "bold red")
    say(console, f"{output}: metrics.json and images")
    return 0
