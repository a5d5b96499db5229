"""Faults pinned: an e-stop, a blocked arm, an arm moved by hand, and joint states that stop, all of
them unnoticed while commands continue; an alarm about an arm that merely lags."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.control.limits import MotionLimiter, MotionState
from pi05_ros.control.tracking import DEFAULT_DELAY_S, TrackingFault, TrackingMonitor
from pi05_ros.types import FloatArray, JointGroup, JointSpec

DT_S = 0.02
SUBSTEPS = 4
JOINTS = JointGroup(
    [
        JointSpec("waist", -3.0, 3.0, 2.0, 10.0),
        JointSpec("elbow", -2.0, 2.0, 2.5, 15.0),
        JointSpec("grip", -0.5, 0.5, 0.5, 5.0, gripper=True),
    ]
)


class Arm:
    """Joints that follow random targets with a delay and a first-order lag."""

    def __init__(self, delay_s: float = 0.0, lag_s: float = 0.055, seed: int = 0) -> None:
        self.now_s = 100.0
        self.blocked: tuple[int, ...] = ()
        self.offset: np.ndarray = np.zeros(len(JOINTS))
        self._rng = np.random.default_rng(seed)
        self._limiter = MotionLimiter(JOINTS, DT_S)
        self._state = self._limiter.at_rest(np.zeros(len(JOINTS)))
        self._step_s = DT_S / SUBSTEPS
        self._past = [self._state.position] * (round(delay_s / self._step_s) + 1)
        self._share = min(1.0, self._step_s / max(lag_s, 1e-9))
        self._measured = self._state.position.copy()
        self._goal = self._state.position
        self._ticks = 0

    def tick(self) -> tuple[FloatArray, tuple[float, FloatArray]]:
        """What is commanded at `now_s`, and the newest joint state."""
        if self._ticks % 20 == 0:
            self._goal = self._rng.uniform(-1.5, 1.5, len(JOINTS))
        self._ticks += 1
        before, after = self._state, self._limiter.step(self._state, self._goal)[0]
        for k in range(1, SUBSTEPS + 1):
            self._past = [*self._past[1:], between(before, after, k / SUBSTEPS)]
            wanted = np.where(np.isin(range(3), self.blocked), self._measured, self._past[0])
            self._measured = self._measured + self._share * (wanted - self._measured)
        self._state = after
        self.now_s += DT_S
        noise = 0.0005 * self._rng.standard_normal(len(JOINTS))
        return after.position, (self.now_s, self._measured + self.offset + noise)


def between(before: MotionState, after: MotionState, share: float) -> FloatArray:
    velocity = before.velocity + share * (after.velocity - before.velocity)
    return np.asarray(before.position + share * DT_S / 2 * (before.velocity + velocity))


def run(
    monitor: TrackingMonitor, arm: Arm, seconds: float
) -> Iterator[tuple[float, TrackingFault | None]]:
    """Time since the start and the monitor's result, until it ends the motion."""
    began_s = arm.now_s
    while arm.now_s - began_s < seconds:
        commanded, state = arm.tick()
        fault = monitor.check(arm.now_s, commanded, state)
        yield arm.now_s - began_s, fault
        if fault is not None:
            return


@pytest.mark.parametrize(
    ("delay_s", "lag_s"), [(0.0, 0.0), (0.0, 0.055), (0.03, 0.07), (0.1, 0.0), (0.05, 0.1)]
)
def test_an_arm_that_lags_is_no_fault_and_its_delay_is_found(delay_s: float, lag_s: float) -> None:
    monitor, arm = TrackingMonitor(JOINTS), Arm(delay_s, lag_s)
    arm.offset = np.array([0.02, -0.02, 0.0])
    for _, fault in run(monitor, arm, 20.0):
        assert fault is None and monitor.problem == ""
    assert monitor.delay_s == pytest.approx(delay_s + lag_s, abs=0.015)
    assert monitor.limits[0] == pytest.approx(max(2.0 * (monitor.delay_s + 0.045), 0.12))
    assert np.isinf(monitor.limits[2])


@pytest.mark.parametrize("moved_s", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("blocked", [(0,), (0, 1, 2)])
def test_joints_that_do_not_follow_are_reported_at_once_and_end_the_motion(
    moved_s: float, blocked: tuple[int, ...]
) -> None:
    """An e-stop before the first motion must not be learned as a longer delay."""
    monitor, arm = TrackingMonitor(JOINTS), Arm()
    assert all(fault is None for _, fault in run(monitor, arm, moved_s))
    arm.blocked = blocked
    reported_s = fault = None
    for since_s, verdict in run(monitor, arm, 3.0):
        fault = verdict
        if monitor.problem and reported_s is None:
            reported_s = since_s
    assert reported_s is not None and reported_s < 0.6
    assert fault is not None and not fault.stale
    assert since_s - reported_s == pytest.approx(0.5, abs=0.2)
    assert "joint 'waist'" in fault.reason or blocked != (0,)
    assert "e-stop, drives off, or an obstacle?" in fault.reason
    assert monitor.delay_s == pytest.approx(DEFAULT_DELAY_S, abs=0.015)


def test_an_arm_moved_by_hand_ends_the_motion() -> None:
    monitor = TrackingMonitor(JOINTS)
    position = np.zeros(3)
    for k in range(200):
        hand = np.array([0.0, min(0.5, 0.02 * k), 0.0])
        fault = monitor.check(100.0 + k * DT_S, position, (100.0 + k * DT_S, hand))
        if fault is not None:
            break
    assert fault is not None and "joint 'elbow' is 0.5 from its command" in fault.reason


def test_an_error_that_passes_is_a_warning_alone() -> None:
    monitor = TrackingMonitor(JOINTS)
    position = np.zeros(3)
    problems = []
    for k in range(200):
        away = np.array([0.4 if 50 <= k < 70 else 0.0, 0.0, 0.0])
        assert monitor.check(100.0 + k * DT_S, position, (100.0 + k * DT_S, away)) is None
        problems.append(monitor.problem)
    assert problems[55].startswith("tracking: joint 'waist' is 0.4 from its command, limit 0.19")
    assert problems[45] == problems[75] == ""


def test_a_gripper_that_holds_an_object_is_no_fault() -> None:
    monitor = TrackingMonitor(JOINTS)
    for k in range(200):
        state = (100.0 + k * DT_S, np.array([0.0, 0.0, 0.4]))
        assert monitor.check(100.0 + k * DT_S, np.zeros(3), state) is None
    assert monitor.problem == ""


def test_a_limit_may_be_given_by_joint_for_grippers_too() -> None:
    joints = JointGroup(
        [
            JointSpec("waist", -3.0, 3.0, 2.0, 10.0, max_tracking_error=1.0),
            JointSpec("grip", -0.5, 0.5, 0.5, 5.0, gripper=True, max_tracking_error=0.1),
        ]
    )
    monitor = TrackingMonitor(joints)
    assert monitor.limits.tolist() == [1.0, 0.1]
    monitor.check(100.0, np.zeros(2), (100.0, np.array([0.9, 0.05])))
    assert monitor.problem == ""
    monitor.check(100.02, np.zeros(2), (100.02, np.array([0.9, 0.2])))
    assert "'grip' is 0.2" in monitor.problem


def test_joint_states_that_stop_in_motion_end_it() -> None:
    monitor, arm = TrackingMonitor(JOINTS, time_s=0.5, max_state_age_s=0.1), Arm()
    for _, fault in run(monitor, arm, 2.0):
        assert fault is None
    commanded, state = arm.tick()
    since_s = 0.0
    while fault is None:
        since_s += DT_S
        fault = monitor.check(arm.now_s + since_s, commanded, state)
    assert fault.stale and "no joint state for" in fault.reason
    assert since_s == pytest.approx(0.6, abs=0.03)


def test_time_0_switches_the_monitor_off() -> None:
    monitor = TrackingMonitor(JOINTS, time_s=0.0)
    for k in range(200):
        assert monitor.check(100.0 + k, np.zeros(3), (100.0, np.full(3, 3.0))) is None
    assert monitor.problem == "" and (monitor.errors == 0).all()


def test_the_next_motion_starts_without_the_last_ones_error() -> None:
    monitor = TrackingMonitor(JOINTS)
    for k in range(20):
        monitor.check(100.0 + k * DT_S, np.zeros(3), (100.0 + k * DT_S, np.full(3, 0.4)))
    assert monitor.problem
    monitor.reset()
    assert monitor.problem == "" and (monitor.errors == 0).all()
    there = np.full(3, 0.4)
    assert monitor.check(101.0, there, (101.0, there)) is None and monitor.problem == ""


@pytest.mark.parametrize("time_s", [-1.0, float("nan"), float("inf")])
def test_a_time_out_of_range_is_refused(time_s: float) -> None:
    with pytest.raises(ValueError, match="tracking_time_s"):
        TrackingMonitor(JOINTS, time_s)


@settings(max_examples=50)
@given(data=st.data())
def test_any_measured_values_and_stamps_give_finite_figures(
    data: st.DataObject,
) -> None:
    """Ticks of any spacing, stamps that repeat or run back, positions up to 1e9."""
    monitor = TrackingMonitor(JOINTS)
    numbers: Callable[..., st.SearchStrategy[float]] = st.floats
    now_s = 100.0
    for _ in range(data.draw(st.integers(1, 40))):
        now_s += data.draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, -0.01]))
        commanded = np.array(data.draw(st.tuples(*[numbers(-3.0, 3.0)] * 3)))
        measured = np.array(data.draw(st.tuples(*[numbers(-1e9, 1e9)] * 3)))
        monitor.check(now_s, commanded, (now_s - data.draw(numbers(-0.1, 0.5)), measured))
        assert np.isfinite(monitor.errors).all() and 0 <= monitor.delay_s <= 0.3
        assert (monitor.limits > 0).all()
