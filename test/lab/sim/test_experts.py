"""Faults pinned: a plan that remembers earlier calls or changes the simulator, targets that are not
finite, out of range or too fast, a task that the expert does not manage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.experts import Expert, grippers_to_metres, grippers_to_unit
from pi05_lab.sim.judge import Judge, arm_slice
from pi05_lab.sim.motion import DT_S
from pi05_lab.sim.scene import GRIPPER_CLOSED_M, GRIPPER_OPEN_M
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import Task, all_tasks

SIM = SimulatedAloha()
EXPERT = Expert(SIM)
TASKS = all_tasks()
ARMS = [*range(6), *range(7, 13)]


def run_episode(task: Task, seed: int, disturbed: bool = False) -> Judge:
    """One task in closed loop for up to 8 s, with a new plan every 8 ticks of 50 Hz."""
    rng = np.random.default_rng(seed)
    (random_start if disturbed or task.verb == "home" else reset_for)(SIM, task, rng)
    judge = Judge(task, SIM)
    for tick in range(400):
        if tick % 8 == 0:
            plan = EXPERT.plan(task)
        SIM.set_targets(plan[tick % 8])
        SIM.step(4)
        judge.update()
        if judge.done:
            break
    return judge


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_same_state_gives_the_same_plan_and_nothing_moves(task: Task) -> None:
    random_start(SIM, task, np.random.default_rng(1))
    before = SIM.qpos(), SIM.data.ctrl.copy(), SIM.time_s
    plan = EXPERT.plan(task)
    for other in TASKS[::5]:
        EXPERT.plan(other)
    np.testing.assert_array_equal(EXPERT.plan(task), plan)
    np.testing.assert_array_equal(Expert(SIM).plan(task), plan)
    np.testing.assert_array_equal(before[0], SIM.qpos())
    np.testing.assert_array_equal(before[1], SIM.data.ctrl)
    assert before[2] == SIM.time_s


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(TASKS), st.sampled_from([1, 7, 50]))
def test_any_state_has_a_plan_within_the_ranges(seed: int, task: Task, horizon: int) -> None:
    rng = np.random.default_rng(seed)
    SIM.reset(seed)
    qpos = SIM.qpos()
    for joint in range(SIM.model.njnt):
        start = SIM.model.jnt_qposadr[joint]
        if SIM.model.jnt_limited[joint]:
            qpos[start] = rng.uniform(*SIM.model.jnt_range[joint])
        else:
            rotation = rng.normal(size=4)
            qpos[start : start + 3] = rng.uniform([-0.5, 0.2, -0.5], [0.5, 1.0, 0.4])
            qpos[start + 3 : start + 7] = rotation / np.linalg.norm(rotation)
    SIM.set_qpos(qpos)
    plan = EXPERT.plan(task, horizon)
    assert plan.shape == (horizon, 14)
    assert np.isfinite(plan).all()
    assert (plan >= SIM.lower).all()
    assert (plan <= SIM.upper).all()


@pytest.mark.parametrize("task", TASKS[::2], ids=str)
def test_plans_keep_to_the_robots_speeds(task: Task) -> None:
    for seed in range(3):
        random_start(SIM, task, np.random.default_rng(seed))
        plan = EXPERT.plan(task)
        velocity = np.diff(plan, axis=0) / DT_S
        assert np.abs(velocity[:, ARMS]).max() < 2.0
        assert np.abs(velocity[:, [6, 13]]).max() <= 0.15 + 1e-9
        assert np.abs(np.diff(velocity[:, ARMS], axis=0)).max() / DT_S < 10.0
        assert np.abs(plan[0] - SIM.positions()).max() < 0.12


def test_the_arm_without_a_task_stays_at_home() -> None:
    SIM.reset(0)
    plan = EXPERT.plan(Task("touch", "right", "red"))
    np.testing.assert_allclose(plan[:, arm_slice("left")], [HOME_POSITIONS[:6]] * 50, atol=1e-6)
    assert np.abs(plan[:, arm_slice("right")] - HOME_POSITIONS[7:13]).max() > 0.3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("verb", ["touch", "pick", "place", "wave", "home"])
def test_tasks_are_done_from_home_and_from_disturbed_states(verb: str, side: str) -> None:
    tasks = [task for task in TASKS if task.verb == verb and task.side in (side, None)]
    for seed, disturbed in ((0, False), (1, False), (2, True)):
        task = tasks[seed % len(tasks)]
        judge = run_episode(task, seed, disturbed)
        assert judge.done and not judge.wrong, task


def test_a_cube_in_the_hand_is_put_down_before_another_is_touched() -> None:
    run_episode(Task("pick", "left", "red"), seed=0)
    assert SIM.cube_position("red")[2] > 0.08
    for tick in range(200):
        if tick % 8 == 0:
            plan = EXPERT.plan(Task("touch", "left", "blue"))
        SIM.set_targets(plan[tick % 8])
        SIM.step(4)
    assert SIM.cube_position("red")[2] == pytest.approx(0.02, abs=0.003)
    assert np.hypot(*(SIM.tool_position("left") - SIM.cube_position("blue"))[:2]) < 0.01


def test_a_cube_that_is_not_there_is_rejected() -> None:
    with pytest.raises(ValueError, match="yellow"):
        EXPERT.plan(Task("touch", "left", "yellow"))


def test_gripper_units() -> None:
    ends = np.array([HOME_POSITIONS, HOME_POSITIONS])
    ends[:, 6] = ends[:, 13] = GRIPPER_CLOSED_M, GRIPPER_OPEN_M
    units = grippers_to_unit(ends)
    np.testing.assert_allclose(units[:, [6, 13]], [[0, 0], [1, 1]], atol=1e-12)
    np.testing.assert_array_equal(units[:, ARMS], ends[:, ARMS])
    np.testing.assert_allclose(grippers_to_metres(units), ends, atol=1e-12)
