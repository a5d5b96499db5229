"""The simulated robot's tasks and their instructions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi05_lab.sim.scene import CUBE_COLORS, SIDES

VERBS = ("touch", "pick", "place", "wave", "home")
CUBE_VERBS = ("touch", "pick", "place")
MIDDLE_M = (0.0, 0.6)
"""x and y of the table's middle in the world."""

_TRAINED = {
    "touch": (
        "touch the {color} cube with the {side} arm",
        "touch the {color} block with the {side} hand",
        "with the {side} arm touch the {color} cube",
        "tap the {color} cube with the {side} arm",
        "touch the {color} cube using your {side} hand",
        "please tap the {color} block using the {side} arm",
    ),
    "pick": (
        "pick up the {color} cube with the {side} arm",
        "pick up the {color} block with the {side} hand",
        "with the {side} arm pick up the {color} cube",
        "lift the {color} cube with the {side} arm",
        "pick the {color} cube up using your {side} hand",
        "please lift the {color} block using the {side} arm",
    ),
    "place": (
        "put the {color} cube in the middle with the {side} arm",
        "put the {color} block in the middle with the {side} hand",
        "with the {side} arm put the {color} cube in the middle",
        "move the {color} cube to the middle with the {side} arm",
        "put the {color} cube in the middle of the table using your {side} hand",
        "please move the {color} block to the middle of the table using the {side} arm",
    ),
    "wave": (
        "wave with the {side} arm",
        "wave your {side} hand",
        "with the {side} arm wave",
        "please wave using your {side} arm",
        "swing the {side} arm",
        "please swing your {side} hand",
    ),
    "home": (
        "go home",
        "move the arms home",
        "go back home",
        "return home",
        "please move your arms back home",
        "return both arms",
    ),
}
_HELD_OUT = {
    "touch": (
        "please touch the {color} cube with your {side} hand",
        "with the {side} hand tap the {color} block",
        "tap the {color} block with your {side} arm",
    ),
    "pick": (
        "please pick up the {color} cube with your {side} hand",
        "with the {side} hand lift the {color} block",
        "lift up the {color} block with your {side} arm",
    ),
    "place": (
        "please put the {color} cube in the middle with your {side} hand",
        "with the {side} hand move the {color} block to the middle",
        "move the {color} block to the middle of the table with your {side} arm",
    ),
    "wave": (
        "please wave with your {side} hand",
        "with the {side} hand wave",
        "swing your {side} arm",
    ),
    "home": ("please go back home", "move both arms back home", "please return your arms home"),
}


@dataclass(frozen=True)
class Task:
    """One task; ValueError if a field is unknown, missing, or does not belong to the verb.

    Attributes:
        verb: one of `VERBS`: "pick" is to pick up, "place" to put in the table's middle.
        side: the arm, "left" or "right"; None for "home", which is for both.
        color: the cube, for `CUBE_VERBS`; else None.
    """

    verb: str
    side: str | None = None
    color: str | None = None

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ValueError(f"verb must be one of {VERBS}, got {self.verb!r}")
        sides = (None,) if self.verb == "home" else SIDES
        if self.side not in sides:
            raise ValueError(f"the side of {self.verb!r} must be one of {sides}, got {self.side!r}")
        colors = tuple(CUBE_COLORS) if self.verb in CUBE_VERBS else (None,)
        if self.color not in colors:
            raise ValueError(
                f"the color of {self.verb!r} must be one of {colors}, got {self.color!r}"
            )


def all_tasks(
    cubes: Sequence[str] = ("red", "green", "blue"), verbs: Sequence[str] = VERBS
) -> list[Task]:
    """Every task of `verbs` on a table with `cubes`."""
    return [
        Task(verb, side, color)
        for verb in verbs
        for side in ((None,) if verb == "home" else SIDES)
        for color in (cubes if verb in CUBE_VERBS else (None,))
    ]


def wordings(task: Task, held_out: bool = False) -> list[str]:
    """The instructions of a task for training, the plainest first, or those held out of it.

    Held-out ones are made of words that occur in training.
    """
    templates = (_HELD_OUT if held_out else _TRAINED)[task.verb]
    return [text.format(side=task.side, color=task.color) for text in templates]


def instruction(task: Task, rng: np.random.Generator, held_out: bool = False) -> str:
    """A random one of `wordings`."""
    texts = wordings(task, held_out)
    return texts[rng.integers(len(texts))]


_TASKS = {
    text: task
    for task in all_tasks(tuple(CUBE_COLORS))
    for held_out in (False, True)
    for text in wordings(task, held_out)
}


def parse(instruction: str) -> Task | None:
    """The task of an instruction; None if it is not one of `wordings`.

    Ignores capitals, spaces and punctuation.
    """
    return _TASKS.get(" ".join(re.findall(r"[a-z']+", instruction.lower())))
