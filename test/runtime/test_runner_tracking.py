"""Commanded against measured, in the control tick.

Faults pinned: commands that continue while the drives are off, while an arm is blocked or moved by
hand, or after its joint states have stopped; a step when the drives come back.
"""

from __future__ import annotations

import numpy as np
import pytest
from runner_rig import DT_S, Rig  # type: ignore[import-not-found]

from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.runner import Tick


def test_an_emergency_stop_is_a_problem_at_once_and_then_latched(rig: Rig) -> None:
    rig.start()
    rig.drives_on = False
    rig.until(lambda _: any(p.startswith("tracking") for p in rig.problems()))
    told_s = rig.now_s
    assert not rig.runner.stopped and rig.stream.active
    (problem,) = (p for p in rig.problems() if p.startswith("tracking"))
    assert "joint 'elbow' is 0." in problem and ", limit 0." in problem
    tick = rig.until(lambda tick: tick.braking is not None)
    assert rig.now_s - told_s == pytest.approx(0.5, abs=2 * DT_S)
    braking = tick.braking
    assert braking is not None and braking.trajectory is not None and tick.trajectory is None
    assert (braking.trajectory.velocities[-1] == 0).all()
    assert any("'elbow'" in notice and "brake" in notice for notice in tick.notices)
    assert rig.runner.stopped
    (problem,) = rig.problems()
    assert problem.startswith("stopped: joint 'elbow' is 0.")
    assert "e-stop, drives off, or an obstacle?" in problem and "~/resume" in problem
    assert all(rig.tick() == Tick() for _ in range(50))


def test_resume_starts_where_the_arms_are_and_forgets_the_reason(rig: Rig) -> None:
    """Pins: a step to where the arms would be, when the drives come back."""
    rig.start()
    rig.drives_on = False
    rig.until(lambda _: rig.runner.stopped)
    where = rig.measured
    assert abs(rig.stream.commanded(rig.now_s).position[0] - where[0]) > 0.1
    for _ in range(20):
        rig.tick()
    rig.runner.resume()
    trajectory = rig.trajectory()
    np.testing.assert_allclose(trajectory.positions[0], where)
    rig.drives_on = True
    for _ in range(100):
        rig.tick()
    assert not rig.runner.stopped and rig.problems() == []
    rig.runner.stop(rig.now_s)
    assert rig.problems() == ["stopped: ~/resume ends it"]


def test_an_arm_at_rest_that_is_moved_by_hand_is_a_problem(rig: Rig) -> None:
    """The chunks have ended and the stream holds its position."""
    rig.start()
    for _ in range(120):
        rig.tick(see=False)
    rig.drives_on = False
    for k in range(100):
        rig.measured = rig.measured - [0.01 if k < 30 else 0.0, 0.0]
        tick = rig.tick(see=False)
        if tick.braking is not None:
            break
    assert rig.runner.stopped and "'elbow'" in rig.problems()[0]


def test_joint_states_that_stop_in_motion_end_it_until_they_come_back(rig: Rig) -> None:
    """Pins: commands for seconds to an arm of which nothing is known; it needs no ~/resume."""
    rig.start()
    last_s = rig.now_s
    tick = rig.until(lambda tick: tick.braking is not None, feel=False, see=False)
    assert rig.now_s - last_s == pytest.approx(0.6, abs=2 * DT_S)
    assert any("no joint state for 0.6" in notice for notice in tick.notices)
    assert not rig.runner.stopped
    assert all(rig.tick(see=False, feel=False).trajectory is None for _ in range(50))
    trajectory = rig.trajectory()
    np.testing.assert_allclose(trajectory.positions[0], rig.measured)


def test_the_monitor_can_be_switched_off(rig: Rig) -> None:
    rig.runner = rig.make_runner(tracking=TrackingMonitor(rig.joints, time_s=0.0))
    rig.start()
    rig.drives_on = False
    for _ in range(100):
        assert rig.tick().braking is None
    assert rig.problems() == []


def test_the_figures_of_tracking_are_there_for_a_status(rig: Rig) -> None:
    rig.start()
    rig.drives_on = False
    rig.until(lambda _: rig.runner.tracking.problem)
    tracking = rig.runner.tracking
    assert tracking.errors.shape == tracking.limits.shape == (2,)
    assert tracking.errors[0] > tracking.limits[0] and np.isinf(tracking.limits[1])
    assert 0 <= tracking.delay_s <= 0.3
    rig.runner.stop(rig.now_s)
    assert (rig.runner.tracking.errors == 0).all()


@pytest.mark.parametrize("wrong", [0.7, 1e9])
def test_a_wrong_joint_state_in_motion_is_seen_by_no_inference(rig: Rig, wrong: float) -> None:
    """Pins: an encoder's glitch as the state that a chunk begins at, without a word."""
    rig.start()
    rig.policy.seen.clear()
    ticks = iter(range(1000))

    def glitch() -> None:
        rig.measured = rig.stream.commanded(rig.now_s).position
        error = wrong if next(ticks) % 4 == 0 else 0.0
        rig.buffer.put_joints(rig.now_s, rig.measured + np.array([error, 0.0]))

    rig.feel = glitch  # type: ignore[method-assign]
    rig.until(lambda _: len(rig.policy.seen) > 20)
    assert rig.stream.active
    states = np.array([observation.state[0] for observation in rig.policy.seen])
    assert (np.abs(states) < 0.6).all(), states
