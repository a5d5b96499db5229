"""Pins the simulated controller: interpolation, replacement, the real one's quirks, its rules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_lab.sim.controller import (
    JointTrajectoryController,
    Trajectory,
    TrajectoryRejected,
    check_trajectory,
)

JOINTS = ("shoulder", "elbow", "wrist")
ZERO = np.zeros(3)
PERIOD_S = 1e-3

values = st.floats(-2.0, 2.0)
points = arrays(np.float64, (4, 3), elements=values)


class Joints:
    """A controller of joints that are, and so are measured, where it commanded them before."""

    def __init__(self, **options: bool) -> None:
        self.controller = JointTrajectoryController(JOINTS, update_rate_hz=1 / PERIOD_S, **options)
        self.controller.hold(ZERO)
        self.positions: np.ndarray = ZERO
        self.velocities: np.ndarray = ZERO
        self.now_s = math.nan

    def cycle(self, now_s: float) -> None:
        """One cycle, which commands the state of one period later."""
        self.positions, self.velocities = self.controller.update(
            now_s, self.positions, self.velocities
        )
        self.now_s = now_s

    def at(self, time_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Cycles up to one that commands the state of `time_s`, with the last a bit shorter."""
        if math.isnan(self.now_s):
            self.cycle(time_s - PERIOD_S)
        while self.now_s + PERIOD_S < time_s - PERIOD_S:
            self.cycle(self.now_s + PERIOD_S)
        if self.now_s < time_s - PERIOD_S:
            self.cycle(time_s - PERIOD_S)
        return self.positions, self.velocities

    def send(self, trajectory: Trajectory, now_s: float) -> None:
        """The message arrives before the cycle of `now_s`."""
        self.controller.accept(trajectory, now_s)
        self.cycle(now_s)


def at_rest(positions: np.ndarray, velocities: np.ndarray, stamp_s: float) -> Trajectory:
    """Four points 0.1 s apart, the first 0.1 s after the stamp, the last at rest."""
    velocities = velocities.copy()
    velocities[-1] = 0.0
    return Trajectory(JOINTS, stamp_s, [0.1, 0.2, 0.3, 0.4], positions, velocities)


def ramp(stamp_s: float, offset: float = 0.0) -> Trajectory:
    """1 rad/s for one second from the stamp on, then at rest."""
    times = np.linspace(0.0, 1.0, 11)
    positions = np.repeat((times + offset)[:, None], 3, axis=1)
    velocities = np.ones((11, 3))
    velocities[-1] = 0.0
    return Trajectory(JOINTS, stamp_s, times, positions, velocities)


def on_the_ramp(**options: bool) -> Joints:
    """Along `ramp(10)`, sent while all of it was ahead, up to the cycle of 10.5 s."""
    joints = Joints(**options)
    joints.cycle(9.0)
    joints.send(ramp(10.0), 9.0 + PERIOD_S)
    joints.at(10.5 + PERIOD_S)
    np.testing.assert_allclose(joints.positions, 0.5 + PERIOD_S, atol=1e-9)
    return joints


def test_holds_until_the_first_trajectory() -> None:
    controller = JointTrajectoryController(JOINTS)
    with pytest.raises(RuntimeError, match="hold"):
        controller.update(0.0, ZERO)
    controller.hold([1.0, 2.0, 3.0])
    for now_s in (5.0, 99.0):
        positions, velocities = controller.update(now_s, ZERO)
        np.testing.assert_array_equal(positions, [1.0, 2.0, 3.0])
        np.testing.assert_array_equal(velocities, ZERO)


@pytest.mark.parametrize("desired", [True, False])
def test_positions_alone_are_linear(desired: bool) -> None:
    joints = Joints(interpolate_from_desired_state=desired)
    joints.cycle(5.0)
    joints.send(Trajectory(JOINTS, 5.001, [1.0, 3.0], [[1, 1, 1], [2, 0, 1]]), 5.001)
    positions, velocities = joints.at(8.001 - 1.0)
    np.testing.assert_allclose(positions, [1.5, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(velocities, [0.5, -0.5, 0.0], atol=1e-6)


def test_velocities_make_it_cubic() -> None:
    """Rest to rest in one segment is 3s² - 2s³."""
    joints = Joints()
    start = np.zeros((2, 3))
    sent = Trajectory(JOINTS, 1.0, [0.0, 2.0], np.stack([ZERO, ZERO + 1]), start)
    joints.send(sent, 1.0)
    for s in (0.25, 0.5, 0.9):
        positions, velocities = joints.at(1 + 2 * s)
        np.testing.assert_allclose(positions, 3 * s**2 - 2 * s**3)
        np.testing.assert_allclose(velocities, (6 * s - 6 * s**2) / 2)


def test_accelerations_make_it_quintic() -> None:
    """Rest to rest in one segment is 10s³ - 15s⁴ + 6s⁵."""
    joints = Joints()
    zeros = np.zeros((2, 3))
    sent = Trajectory(JOINTS, 1.0, [0.0, 2.0], np.stack([ZERO, ZERO + 1]), zeros, zeros)
    joints.send(sent, 1.0)
    for s in (0.25, 0.5, 0.9):
        positions, velocities = joints.at(1 + 2 * s)
        np.testing.assert_allclose(positions, 10 * s**3 - 15 * s**4 + 6 * s**5)
        np.testing.assert_allclose(velocities, (30 * s**2 - 60 * s**3 + 30 * s**4) / 2)


@pytest.mark.parametrize("with_accelerations", [False, True])
@given(positions=points, velocities=points, accelerations=points)
@settings(max_examples=15, deadline=None)
def test_passes_through_its_points(
    positions: np.ndarray,
    velocities: np.ndarray,
    accelerations: np.ndarray,
    with_accelerations: bool,
) -> None:
    joints = Joints()
    sent = at_rest(positions, velocities, stamp_s=1.0)
    if with_accelerations:
        sent = Trajectory(
            JOINTS, 1.0, sent.times_from_start_s, positions, sent.velocities, accelerations
        )
    joints.send(sent, 1.0)
    expected = np.asarray(sent.velocities)
    for k in range(4):
        position, velocity = joints.at(1.1 + 0.1 * k)
        np.testing.assert_allclose(position, positions[k], atol=1e-6)
        np.testing.assert_allclose(velocity, expected[k], atol=1e-4)
    joints.cycle(50.0)
    np.testing.assert_array_equal(joints.positions, positions[-1])
    np.testing.assert_array_equal(joints.velocities, ZERO)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("desired", [False, True])
def test_points_ahead_are_bridged(desired: bool, replacement: bool) -> None:
    """A cubic to the first point, at once; the running trajectory's points are dropped.

    With replacement it follows the running trajectory to the stamp, one period late.
    """
    joints = on_the_ramp(
        interpolate_from_desired_state=desired, allow_trajectory_replacement=replacement
    )
    stop = Trajectory(JOINTS, 11.4, [0.1, 0.2], np.full((2, 3), 0.2), np.zeros((2, 3)))
    joints.send(stop, 10.5 + PERIOD_S)
    if replacement:
        np.testing.assert_allclose(joints.at(10.9)[0], 0.9 - PERIOD_S, atol=1e-9)
        np.testing.assert_allclose(joints.at(11.4)[0], 1.0, atol=1e-9)
    else:
        assert joints.at(11.45)[0][0] < 0.3
    np.testing.assert_allclose(joints.at(11.5)[0], 0.2, atol=1e-9)


def test_a_bridge_from_the_desired_state_begins_one_period_early() -> None:
    """The state of one period ahead is stored under the time of its cycle.

    A ramp that is sent again, with its first point ahead, makes the joints jump by one period's
    way; a controller that bridges from the measured state, one cycle behind, does not move on.
    """
    for desired, expected in ((True, 2.0), (False, 1.0)):
        joints = on_the_ramp(interpolate_from_desired_state=desired)
        before = joints.positions
        joints.send(ramp(10.5 + 5 * PERIOD_S, offset=0.5 + 5 * PERIOD_S), 10.5 + PERIOD_S)
        share = (joints.positions - before) / PERIOD_S
        np.testing.assert_allclose(share, expected, atol=0.4)


def test_a_bridge_from_a_measured_state_that_lags_goes_back() -> None:
    """Pins: the chatter of controllers with the default `interpolate_from_desired_state`."""
    joints = on_the_ramp(interpolate_from_desired_state=False)
    before = joints.positions
    joints.positions = before - 0.03
    joints.send(ramp(10.55, offset=0.55), 10.5 + PERIOD_S)
    assert (joints.positions < before - 0.02).all()


@pytest.mark.parametrize("desired", [False, True])
def test_points_in_the_past_are_cut_off(desired: bool) -> None:
    """Where the first point is not ahead, nothing is bridged, whatever was measured."""
    joints = on_the_ramp(interpolate_from_desired_state=desired)
    joints.positions = joints.positions - 0.03
    joints.send(ramp(10.2, offset=0.2), 10.5 + PERIOD_S)
    np.testing.assert_allclose(joints.positions, 0.5 + 2 * PERIOD_S, atol=1e-9)
    np.testing.assert_allclose(joints.at(10.75)[0], 0.75, atol=1e-9)


def test_replacement_takes_a_past_stamp_for_the_cycle_before() -> None:
    """Every point is late by the age of the stamp: the joints jump back."""
    joints = on_the_ramp(allow_trajectory_replacement=True)
    joints.send(ramp(10.2, offset=0.2), 10.5 + PERIOD_S)
    np.testing.assert_allclose(joints.positions, 0.2 + PERIOD_S, atol=1e-9)
    np.testing.assert_allclose(joints.at(11.3)[0], 1.0 - PERIOD_S, atol=1e-9)


def test_replacement_does_not_blend_with_a_controller_that_holds() -> None:
    """A trajectory of one point, which is how a controller holds, is replaced."""
    joints = Joints(allow_trajectory_replacement=True)
    joints.cycle(10.0)
    joints.send(ramp(9.9), 10.2)
    np.testing.assert_allclose(joints.positions, 0.3 + PERIOD_S, atol=1e-9)


def test_a_stamp_of_zero_means_the_next_cycle() -> None:
    joints = Joints()
    joints.cycle(10.0)
    joints.send(ramp(0.0), 10.2)
    np.testing.assert_allclose(joints.at(10.6)[0], 0.4, atol=1e-9)


def test_the_newest_message_before_a_cycle_counts() -> None:
    joints = on_the_ramp()
    joints.controller.accept(ramp(10.2, offset=0.7), 10.5)
    joints.controller.accept(ramp(10.2, offset=0.2), 10.5)
    joints.cycle(10.5 + PERIOD_S)
    np.testing.assert_allclose(joints.positions, 0.5 + 2 * PERIOD_S, atol=1e-9)


def test_without_a_velocity_interface_a_bridge_begins_at_rest() -> None:
    joints = on_the_ramp(interpolate_from_desired_state=False)
    joints.controller.accept(ramp(10.7, offset=0.7), 10.5 + PERIOD_S)
    positions, velocities = joints.controller.update(10.5 + PERIOD_S, joints.positions, None)
    assert (velocities < 0.1).all()
    np.testing.assert_allclose(positions, joints.positions, atol=1e-4)


@given(order=st.permutations(range(3)), replacement=st.booleans())
@settings(max_examples=6, deadline=None)
def test_joints_may_come_in_any_order(order: list[int], replacement: bool) -> None:
    positions = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    velocities = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    joints = Joints(allow_trajectory_replacement=replacement)
    names = [JOINTS[i] for i in order]
    sent = Trajectory(names, 1.0, [0.1, 0.2], positions[:, order], velocities[:, order])
    joints.send(sent, 1.0)
    np.testing.assert_allclose(joints.at(1.1), (positions[0], velocities[0]), atol=1e-9)
    np.testing.assert_allclose(joints.at(1.2), (positions[1], velocities[1]), atol=1e-9)


def test_a_refused_trajectory_is_counted_and_changes_nothing() -> None:
    joints = on_the_ramp()
    moving = Trajectory(JOINTS, 0.0, [0.1], np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(TrajectoryRejected, match="velocity is not zero"):
        joints.send(moving, 10.5 + PERIOD_S)
    np.testing.assert_allclose(joints.at(10.7)[0], 0.7, atol=1e-9)
    assert (joints.controller.accepted, joints.controller.rejected) == (1, 1)
    assert "velocity is not zero" in joints.controller.last_rejection
    allowing = Joints(allow_nonzero_velocity_at_trajectory_end=True)
    allowing.send(moving, 1.2)
    assert allowing.controller.accepted == 1


def test_hold_drops_the_trajectory() -> None:
    joints = on_the_ramp()
    joints.controller.accept(ramp(10.2), 10.5)
    joints.controller.hold([0.3, 0.3, 0.3])
    joints.cycle(10.9)
    np.testing.assert_array_equal(joints.positions, [0.3, 0.3, 0.3])


@pytest.mark.parametrize("positions", [[0.0], [0.0, np.nan, 0.0]])
def test_hold_needs_every_joint(positions: list[float]) -> None:
    with pytest.raises(ValueError, match="3 finite values"):
        JointTrajectoryController(JOINTS).hold(positions)


def test_names_and_rate_are_checked() -> None:
    with pytest.raises(ValueError, match="once each"):
        JointTrajectoryController(["elbow", "elbow"])
    with pytest.raises(ValueError, match="update_rate_hz"):
        JointTrajectoryController(JOINTS, update_rate_hz=0.0)


NOW = 100.0


def trajectory(**changes: Any) -> Trajectory:
    good = Trajectory(
        joint_names=JOINTS,
        stamp_s=NOW,
        times_from_start_s=[0.0, 0.1, 0.2],
        positions=np.arange(9.0).reshape(3, 3),
        velocities=np.array([[1.0] * 3, [1.0] * 3, [0.0] * 3]),
        accelerations=np.zeros((3, 3)),
    )
    return replace(good, **changes)


NAN = np.full((3, 3), np.nan)
BROKEN = [
    ({"joint_names": JOINTS[:2]}, "2 joints are given, the controller has 3"),
    ({"joint_names": ()}, "0 joints"),
    ({"joint_names": ("shoulder", "elbow", "gripper")}, "'gripper' is not one of"),
    ({"joint_names": ("shoulder", "elbow", "elbow")}, "'elbow'|'wrist'"),
    ({"times_from_start_s": [], "positions": np.empty((0, 3))}, "empty"),
    ({"times_from_start_s": [0.0, 0.1, 0.1]}, "strictly increasing between points 1 and 2"),
    ({"times_from_start_s": [0.0, 0.2, 0.1]}, "strictly increasing between points 1 and 2"),
    ({"times_from_start_s": [0.0, np.nan, 0.2]}, "times_from_start is not finite at point 1"),
    ({"positions": np.zeros((3, 2))}, "positions has shape"),
    ({"positions": np.zeros((2, 3))}, "positions has shape"),
    ({"positions": [[0, 0, 0], [0, 0], [0, 0, 0]]}, "positions is not an array"),
    ({"positions": NAN}, "positions is not finite at point 0"),
    ({"velocities": np.zeros((3, 2))}, "velocities has shape"),
    ({"velocities": NAN}, "velocities is not finite"),
    ({"velocities": np.array([[0, 0, 0], [0, 0, 0], [0, -0.01, 0]])}, "zero for joint elbow"),
    ({"accelerations": np.zeros((3, 4))}, "accelerations has shape"),
    ({"accelerations": NAN}, "accelerations is not finite"),
    ({"velocities": None}, "accelerations are given without velocities"),
    ({"stamp_s": NOW - 0.3}, "ends in the past, 0.100 s ago"),
    ({"stamp_s": np.inf}, "stamp is not finite"),
]


@pytest.mark.parametrize(("changes", "reason"), BROKEN)
def test_each_rule_has_its_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TrajectoryRejected, match=reason):
        check_trajectory(trajectory(**changes), JOINTS, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"joint_names": ("wrist", "shoulder", "elbow")},
        {"stamp_s": 0.0},
        {"stamp_s": NOW - 0.15},
        {"stamp_s": NOW + 10.0},
        {"accelerations": None},
        {"accelerations": None, "velocities": None},
        {"velocities": np.array([[1.0] * 3, [1.0] * 3, [1e-7] * 3])},
        {"times_from_start_s": [0.1, 0.2, 0.3]},
    ],
)
def test_trajectories_that_the_controller_accepts(changes: dict[str, Any]) -> None:
    check_trajectory(trajectory(**changes), JOINTS, NOW)
    check_trajectory(Trajectory(JOINTS, 0.0, [0.5], np.zeros((1, 3))), JOINTS, NOW)


def test_a_moving_end_can_be_allowed() -> None:
    moving = trajectory(velocities=np.ones((3, 3)))
    with pytest.raises(TrajectoryRejected):
        check_trajectory(moving, JOINTS, NOW)
    check_trajectory(moving, JOINTS, NOW, allow_nonzero_velocity_at_trajectory_end=True)
