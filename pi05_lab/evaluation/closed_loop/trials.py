"""Which episodes are played: task, places, wording, and what a control takes away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pi05_lab.sim.scene import CUBE_COLORS, SIDES
from pi05_lab.sim.tasks import VERBS, Task, all_tasks, instruction

Condition = Literal["plain", "shuffled", "black"]

CUBES = ("red", "green", "blue")
"""On the table."""

_DOMAIN = 0x5E7E_7A1E
"""First word of every seed here: recordings draw from other streams of random numbers."""
_ALL_TASKS = all_tasks(tuple(CUBE_COLORS))


@dataclass(frozen=True)
class Trial:
    """One episode to be played. The same trial gives the same places and the same noise.

    Attributes:
        task: what counts as success.
        number: of the episode among those of its task.
        seed: of the whole evaluation.
        told: the task that the instruction asks for; another one than `task` if shuffled.
        instruction: what the policy is told.
        condition: "plain"; "shuffled", told another task; "black", all pictures are black.
    """

    task: Task
    number: int
    seed: int
    told: Task
    instruction: str
    condition: Condition = "plain"

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Depends on task, number and seed alone: conditions and settings are compared in pairs."""
        return _rng(self.seed, self.task, self.number, stream)

    @property
    def policy_seed(self) -> int:
        return int(self.rng(stream=2).integers(1 << 31))


def plan_trials(
    counted: Sequence[tuple[Task, int]],
    seed: int,
    *,
    held_out: bool = True,
    condition: Condition = "plain",
) -> list[Trial]:
    """Episodes 0 … count − 1 of each task.

    Args:
        counted: tasks and how many episodes of each.
        seed: of places, wordings and the policy's noise.
        held_out: wordings that no training sees, else those that it does.
        condition: of all of them; "shuffled" tells another task of the same verb, with another
            arm or cube ("home" has no other: any other task).
    """
    trials = []
    for task, count in counted:
        for number in range(count):
            rng = _rng(seed, task, number, stream=1)
            told = _other_task(task, rng) if condition == "shuffled" else task
            text = instruction(told, rng, held_out)
            trials.append(Trial(task, number, seed, told, text, condition))
    return trials


def chosen_tasks(
    verbs: Sequence[str], cubes: Sequence[str] = CUBES, arms: Sequence[str] = SIDES
) -> list[Task]:
    """The tasks of these verbs with these cubes and arms; "home" is for both."""
    tasks = all_tasks(cubes, verbs)
    return [task for task in tasks if task.side is None or task.side in arms]


def spread(tasks: Sequence[Task], per_verb: int) -> list[tuple[Task, int]]:
    """So many episodes of each verb, as evenly as can be over its tasks."""
    counted = []
    for verb in dict.fromkeys(task.verb for task in tasks):
        same = [task for task in tasks if task.verb == verb]
        half = len(same) // 2
        # both ends in turn, so that a few episodes have both arms
        turns = [
            task for pair in zip(same, same[half:] + same[:half], strict=True) for task in pair
        ]
        each, more = divmod(per_verb, len(same))
        extra = set(list(dict.fromkeys(turns))[:more])
        counted += [(task, each + (task in extra)) for task in same]
    return [(task, count) for task, count in counted if count]


def _other_task(task: Task, rng: np.random.Generator) -> Task:
    others = [other for other in all_tasks(CUBES, (task.verb,)) if other != task]
    if not others:
        others = [other for other in all_tasks(CUBES, VERBS) if other.verb != task.verb]
    return others[int(rng.integers(len(others)))]


def _rng(seed: int, task: Task, number: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([_DOMAIN, seed, _ALL_TASKS.index(task), number, stream])
