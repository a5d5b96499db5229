"""Measures the scripted expert: how often it does a task, and how long it takes."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.experts import Expert
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.motion import DT_S
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import VERBS, Task, all_tasks

LIMIT_S = 8.0


@dataclass(frozen=True)
class Outcome:
    """How an episode ended."""

    task: Task
    start: str
    """"home" or the kind that `random_start` drew."""
    seconds: float | None
    """Simulated time to success; None for a failure."""
    wrong: bool


def run_episode(
    sim: SimulatedAloha,
    expert: Expert,
    task: Task,
    rng: np.random.Generator,
    disturbed: bool = False,
    replan_steps: int = 8,
    limit_s: float = LIMIT_S,
) -> Outcome:
    """One task in closed loop: a plan's first `replan_steps` rows at 50 Hz, then the next plan.

    Args:
        sim: is reset.
        expert: of the same `sim`.
        task: to be done.
        rng: draws the places, and the state of the arms if `disturbed`.
        disturbed: begin with `random_start`; "home" always does.
        replan_steps: rows of a plan that are carried out.
        limit_s: simulated time after which a task that is not done has failed.
    """
    start = "home"
    if disturbed or task.verb == "home":
        start = random_start(sim, task, rng)
    else:
        reset_for(sim, task, rng)
    judge = Judge(task, sim)
    physics_steps = round(DT_S / sim.model.opt.timestep)
    for tick in range(round(limit_s / DT_S)):
        if tick % replan_steps == 0:
            plan = expert.plan(task)
        sim.set_targets(plan[tick % replan_steps])
        sim.step(physics_steps)
        judge.update()
        if judge.done:
            break
    return Outcome(task, start, judge.done_at_s, judge.wrong)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--episodes", type=int, default=60, help="for each verb (default: 60)")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=VERBS, help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    parser.add_argument(
        "--disturbed", action="store_true", help="begin in the midst of tasks, or beside them"
    )


def run(options: argparse.Namespace) -> int:
    """Print a table of success; the exit code."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    if options.episodes < 1:
        console.print(f"--episodes must be at least 1, got {options.episodes}", style="bold red")
        return 1
    sim = SimulatedAloha()
    expert = Expert(sim)
    rng = np.random.default_rng(options.seed)
    tasks = [
        tasks[index % len(tasks)]
        for tasks in (all_tasks(sim.cubes, (verb,)) for verb in options.verbs)
        for index in range(options.episodes)
    ]
    outcomes = defaultdict(list)
    for task in track(tasks, description="episodes", console=console, transient=True):
        outcome = run_episode(sim, expert, task, rng, options.disturbed)
        outcomes[task.verb, task.side or "both"].append(outcome)
    table = Table(title="The expert, " + ("disturbed starts" if options.disturbed else "from home"))
    for heading in ("task", "arm", "done", "%", "wrong", "median s", "slowest s"):
        table.add_column(heading, justify="left" if heading in ("task", "arm") else "right")
    for (verb, side), group in outcomes.items():
        seconds = [outcome.seconds for outcome in group if outcome.seconds is not None]
        table.add_row(
            verb,
            side,
            f"{len(seconds)}/{len(group)}",
            f"{100 * len(seconds) / len(group):.0f}",
            str(sum(outcome.wrong for outcome in group)),
            f"{np.median(seconds):.2f}" if seconds else "–",
            f"{max(seconds):.2f}" if seconds else "–",
        )
    console.print(table)
    for group in outcomes.values():
        for outcome in group:
            if outcome.seconds is None or outcome.wrong:
                console.print(f"missed: {outcome}", markup=False)
    return 0


if __name__ == "__main__":
    argument_parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(argument_parser)
    raise SystemExit(run(argument_parser.parse_args()))
