"""Faults pinned: starts that are not reproducible, cubes that are not in the hand, an occupied
middle, arms in the table, a kind of state that is never drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import MIDDLE_M, Task, all_tasks

SIM = SimulatedAloha()
EXPECTED = {
    "touch": {"jitter", "away", "near", "burdened"},
    "pick": {"jitter", "away", "near", "burdened", "grasping", "holding"},
    "place": {"jitter", "away", "near", "burdened", "grasping", "holding", "released"},
    "wave": {"jitter", "away", "burdened", "waving"},
    "home": {"jitter", "away", "near", "burdened"},
}


@pytest.mark.parametrize("verb", EXPECTED)
def test_every_kind_of_start_is_drawn_and_is_sound(verb: str) -> None:
    rng = np.random.default_rng(0)
    tasks = all_tasks(verbs=(verb,))
    kinds: Counter[str] = Counter()
    for index in range(60):
        task = tasks[index % len(tasks)]
        kind = random_start(SIM, task, rng)
        kinds[kind] += 1
        assert np.abs(SIM.velocities()).max() == 0
        assert SIM.data.ncon == 0 or SIM.data.contact.dist.min() > -0.002
        gaps = {
            (side, cube): np.linalg.norm(SIM.tool_position(side) - SIM.cube_position(cube))
            for side in ("left", "right")
            for cube in SIM.cubes
        }
        if kind == "holding":
            assert gaps[str(task.side), str(task.color)] < 0.015
        if kind == "burdened":
            held = [cube for (_, cube), gap in gaps.items() if gap < 0.015]
            assert held and task.color not in held
    assert set(kinds) == EXPECTED[verb]


def test_a_start_is_reproducible() -> None:
    task = Task("pick", "left", "red")
    states = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        random_start(SIM, Task("wave", "right"), rng)
        random_start(SIM, task, rng)
        states.append(SIM.qpos())
    np.testing.assert_array_equal(states[0], states[1])


def test_reset_for_place_leaves_room_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        reset_for(SIM, Task("place", "left", "red"), rng)
        distances = {c: np.hypot(*(SIM.cube_position(c)[:2] - MIDDLE_M)) for c in SIM.cubes}
        assert distances.pop("red") > 0.06
        assert min(distances.values()) > 0.09
        np.testing.assert_allclose(SIM.positions(), HOME_POSITIONS, atol=1e-9)


def test_home_is_still_to_be_done_from_arms_anywhere() -> None:
    rng, done = np.random.default_rng(0), 0
    for _ in range(30):
        if random_start(SIM, Task("home"), rng) != "jitter":
            judge = Judge(Task("home"), SIM)
            for _ in range(20):
                SIM.data.time += 0.02
                judge.update()
            done += judge.done
    assert done == 0
