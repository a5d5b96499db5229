"""Faults pinned: false or missed successes, a wrong cube or arm, swings that do not wave."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.judge import Judge, arm_slice
from pi05_lab.sim.kinematics import ArmKinematics, above
from pi05_lab.sim.tasks import MIDDLE_M, Task, all_tasks


@pytest.fixture(scope="module")
def shared() -> SimulatedAloha:
    return SimulatedAloha()


@pytest.fixture
def sim(shared: SimulatedAloha) -> SimulatedAloha:
    shared.reset(3)
    return shared


def set_joints(sim: SimulatedAloha, side: str, joints: np.ndarray) -> None:
    qpos = sim.qpos()
    start = sim.model.joint(f"{side}_waist").qposadr[0]
    qpos[start : start + 6] = joints
    sim.set_qpos(qpos)


def bring_tool(sim: SimulatedAloha, side: str, position: np.ndarray) -> None:
    solution = ArmKinematics(sim.model).solve(side, position)
    assert solution.reached
    set_joints(sim, side, solution.joints)


def put_cube(sim: SimulatedAloha, cube: str, position: tuple[float, float, float]) -> None:
    qpos = sim.qpos()
    start = sim.model.joint(f"{cube}_cube").qposadr[0]
    qpos[start : start + 3] = position
    sim.set_qpos(qpos)


def wait(sim: SimulatedAloha, seconds: float, judge: Judge) -> None:
    """Passes simulated time without physics."""
    for _ in range(round(seconds / 0.02)):
        sim.data.time += 0.02
        judge.update()


@pytest.mark.parametrize("task", [task for task in all_tasks() if task.verb != "home"], ids=str)
def test_nothing_is_done_by_standing_at_home(sim: SimulatedAloha, task: Task) -> None:
    judge = Judge(task, sim)
    wait(sim, 1.0, judge)
    assert not judge.done
    assert not judge.wrong


@pytest.mark.parametrize(
    ("offset", "done"),
    [
        ((0.0, 0.0, 0.03), True),
        ((0.015, 0.0, 0.04), True),
        ((0.022, 0.0, 0.03), False),
        ((0.0, 0.0, 0.05), False),
    ],
)
def test_touch(sim: SimulatedAloha, offset: tuple[float, float, float], done: bool) -> None:
    judge = Judge(Task("touch", "left", "red"), sim)
    bring_tool(sim, "left", sim.cube_position("red") + offset)
    wait(sim, 0.1, judge)
    assert judge.done == done
    assert judge.done_at_s == (pytest.approx(0.02) if done else None)
    assert not judge.wrong


@pytest.mark.parametrize(("side", "cube"), [("right", "red"), ("left", "green"), ("right", "blue")])
@pytest.mark.parametrize("verb", ["touch", "pick", "place"])
def test_another_arm_or_cube_is_wrong(sim: SimulatedAloha, verb: str, side: str, cube: str) -> None:
    judge = Judge(Task(verb, "left", "red"), sim)
    bring_tool(sim, side, above(sim.cube_position(cube), 0.03))
    judge.update()
    assert judge.wrong
    assert not judge.done


def test_a_wrong_touch_that_was_there_before_counts_only_once_it_is_repeated(
    sim: SimulatedAloha,
) -> None:
    spot = above(sim.cube_position("green"), 0.03)
    bring_tool(sim, "left", spot)
    judge = Judge(Task("touch", "left", "red"), sim)
    judge.update()
    bring_tool(sim, "left", above(spot, 0.1))
    judge.update()
    assert not judge.wrong
    bring_tool(sim, "left", spot)
    judge.update()
    assert judge.wrong


def test_pick_needs_height_and_the_named_arm(sim: SimulatedAloha) -> None:
    judge = Judge(Task("pick", "left", "red"), sim)
    put_cube(sim, "red", (-0.1, 0.5, 0.12))
    judge.update()
    assert not judge.done
    put_cube(sim, "red", (-0.1, 0.5, 0.06))
    bring_tool(sim, "left", sim.cube_position("red"))
    judge.update()
    assert not judge.done
    put_cube(sim, "red", (-0.1, 0.5, 0.1))
    judge.update()
    assert judge.done


def test_place_needs_rest_in_the_middle_and_a_hand_that_let_go(sim: SimulatedAloha) -> None:
    judge = Judge(Task("place", "left", "red"), sim)
    put_cube(sim, "red", (MIDDLE_M[0] + 0.02, MIDDLE_M[1], 0.02))
    bring_tool(sim, "left", sim.cube_position("red"))
    wait(sim, 0.4, judge)
    assert not judge.done
    bring_tool(sim, "left", above(sim.cube_position("red"), 0.08))
    wait(sim, 0.18, judge)
    assert not judge.done
    wait(sim, 0.1, judge)
    assert judge.done


def test_place_beside_or_above_the_middle_is_not_done(sim: SimulatedAloha) -> None:
    judge = Judge(Task("place", "left", "red"), sim)
    for place in ((0.045, MIDDLE_M[1], 0.02), (0.0, MIDDLE_M[1], 0.06)):
        put_cube(sim, "red", place)
        wait(sim, 0.4, judge)
    assert not judge.done


def swing(
    sim: SimulatedAloha, side: str, amplitude_rad: float, periods: float, judge: Judge
) -> None:
    for time_s in np.arange(0, 1.5 * periods, 0.02):
        joints = HOME_POSITIONS[arm_slice(side)].copy()
        joints[0] = amplitude_rad * np.sin(2 * np.pi * time_s / 1.5)
        set_joints(sim, side, joints)
        sim.data.time = time_s
        judge.update()


def test_wave_is_two_periods_of_enough_amplitude(sim: SimulatedAloha) -> None:
    for amplitude_rad, periods, done in ((0.35, 3, True), (0.35, 1.5, False), (0.12, 6, False)):
        judge = Judge(Task("wave", "right"), sim)
        swing(sim, "right", amplitude_rad, periods, judge)
        assert (judge.done, judge.wrong) == (done, False), (amplitude_rad, periods)


def test_waving_with_the_other_arm_is_wrong(sim: SimulatedAloha) -> None:
    judge = Judge(Task("wave", "left"), sim)
    swing(sim, "right", 0.4, 3, judge)
    assert judge.wrong
    assert not judge.done


def test_home_needs_both_arms_for_a_while(sim: SimulatedAloha) -> None:
    judge = Judge(Task("home"), sim)
    away = HOME_POSITIONS[arm_slice("left")] + [0.0, 0.12, 0.0, 0.0, 0.0, 0.0]
    set_joints(sim, "left", away)
    wait(sim, 0.5, judge)
    assert not judge.done
    set_joints(sim, "left", away - [0.0, 0.05, 0.0, 0.0, 0.0, 0.0])
    wait(sim, 0.3, judge)
    assert judge.done


def test_a_cube_that_is_not_there_is_rejected(sim: SimulatedAloha) -> None:
    with pytest.raises(ValueError, match="yellow"):
        Judge(Task("touch", "left", "yellow"), sim)
