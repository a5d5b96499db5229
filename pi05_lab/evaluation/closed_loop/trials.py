"""Trials of a closed-loop evaluation: which episodes are run, and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pi05_lab.evaluation.closed_loop.agents import Agent
from pi05_lab.evaluation.closed_loop.episode import (
    ClosedLoop,
    Condition,
    Outcome,
    Settings,
    Trial,
    trial_rng,
)  # fmt: skip
from pi05_lab.parallel import run_tasks
from pi05_lab.sim.scene import SIDES
from pi05_lab.sim.tasks import CUBE_VERBS, VERBS, Task, all_tasks, instruction
from pi05_ros.robot_config import RobotConfig

CUBES = ("red", "green", "blue")
"""On the table."""
CONDITIONS: tuple[Condition, ...] = ("plain", "shuffled", "black")
"""The baseline and its ablations."""


def plan_trials(
    counted: Sequence[tuple[Task, int]],
    seed: int,
    *,
    held_out: bool = True,
    conditions: Sequence[Condition] = ("plain",),
) -> list[Trial]:
    """Episodes 0 … count − 1 of each task in each condition.

    Args:
        counted: tasks and their numbers of episodes.
        seed: of places, wordings and the policy's noise.
        held_out: use wordings that no training uses, else those of trainings.
        conditions: "plain"; "shuffled": the instruction names another task of the same verb, with
            another arm or cube ("home" has no other: any other task); "black": all images are
            black, only for tasks with a cube.
    """
    trials = []
    for condition in conditions:
        for task, count in counted:
            if condition == "black" and task.verb not in CUBE_VERBS:
                continue
            for number in range(count):
                rng = trial_rng(seed, task, number, stream=1)
                instructed = task
                if condition == "shuffled":
                    others = [other for other in all_tasks(CUBES, (task.verb,)) if other != task]
                    others = others or all_tasks(CUBES, [v for v in VERBS if v != task.verb])
                    instructed = others[int(rng.integers(len(others)))]
                text = instruction(instructed, rng, held_out)
                trials.append(Trial(task, number, seed, instructed, text, condition))
    return trials


def chosen_tasks(
    verbs: Sequence[str], cubes: Sequence[str] = CUBES, arms: Sequence[str] = SIDES
) -> list[Task]:
    """The tasks with these verbs, cubes and arms; "home" has no arm and is always included."""
    tasks = all_tasks(cubes, verbs)
    return [task for task in tasks if task.side is None or task.side in arms]


def spread(tasks: Sequence[Task], per_verb: int) -> list[tuple[Task, int]]:
    """`per_verb` episodes of each verb, spread evenly over its tasks."""
    counted = []
    for verb in dict.fromkeys(task.verb for task in tasks):
        same = [task for task in tasks if task.verb == verb]
        half = len(same) // 2
        # Alternate between the two arms, so that a few episodes cover both.
        pairs = zip(same, same[half:] + same[:half], strict=True)
        alternating = dict.fromkeys(task for pair in pairs for task in pair)
        each, more = divmod(per_verb, len(same))
        extra = set(list(alternating)[:more])
        counted += [(task, each + (task in extra)) for task in same]
    return [(task, count) for task, count in counted if count]


def play_trials(
    make: Callable[[], Agent],
    trials: Sequence[Trial],
    robot: RobotConfig,
    settings: Settings,
    workers: int = 1,
) -> Iterator[Outcome]:
    """The outcomes, in the order of the trials; the same for any number of workers.

    `make` makes an agent in each worker process; with one worker, in this process.

    Raises:
        SetupError: policy, robot and simulator do not fit together.
        WorkerDied: a worker process was killed.
    """
    return run_tasks(partial(_Player, make, robot, settings), trials, workers)


class _Player:
    def __init__(self, make: Callable[[], Agent], robot: RobotConfig, settings: Settings) -> None:
        self._agent = make()
        self._loop = ClosedLoop(self._agent, robot, settings)

    def __call__(self, trial: Trial) -> Outcome:
        return self._loop.play(trial)

    def close(self) -> None:
        self._agent.close()
