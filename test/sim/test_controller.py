"""Pins the simulated controller's motion: interpolation, replacement, what it counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_ros.sim.controller import JointTrajectoryController, Trajectory, TrajectoryRejected

JOINTS = ("shoulder", "elbow", "wrist")
ZERO = np.zeros(3)
STEP_S = 1e-5

values = st.floats(-2.0, 2.0)
points = arrays(np.float64, (4, 3), elements=values)


def controller(**options: bool) -> JointTrajectoryController:
    made = JointTrajectoryController(JOINTS, **options)
    made.hold(ZERO, 0.0)
    return made


def at_rest(positions: np.ndarray, velocities: np.ndarray, stamp_s: float) -> Trajectory:
    """Four points 0.1 s apart, the first 0.1 s after the stamp, the last at rest."""
    velocities = velocities.copy()
    velocities[-1] = 0.0
    return Trajectory(JOINTS, stamp_s, [0.1, 0.2, 0.3, 0.4], positions, velocities)


def test_holds_until_something_comes() -> None:
    made = JointTrajectoryController(JOINTS)
    with pytest.raises(RuntimeError, match="hold"):
        made.sample(0.0)
    made.hold([1.0, 2.0, 3.0], now_s=5.0)
    positions, velocities = made.sample(99.0)
    np.testing.assert_array_equal(positions, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(velocities, ZERO)


def test_first_trajectory_starts_at_the_measured_state() -> None:
    made = JointTrajectoryController(JOINTS)
    made.accept(Trajectory(JOINTS, 0.0, [1.0], np.ones((1, 3))), 10.0, [0.0, 0.5, 1.0])
    np.testing.assert_allclose(made.sample(10.0)[0], [0.0, 0.5, 1.0])
    np.testing.assert_allclose(made.sample(10.5)[0], [0.5, 0.75, 1.0])


def test_positions_alone_are_linear() -> None:
    made = controller()
    made.accept(Trajectory(JOINTS, 0.0, [1.0, 3.0], [[1, 1, 1], [2, 0, 1]]), 0.0, ZERO)
    positions, velocities = made.sample(2.0)
    np.testing.assert_allclose(positions, [1.5, 0.5, 1.0])
    np.testing.assert_allclose(velocities, [0.5, -0.5, 0.0])


def test_velocities_make_it_cubic() -> None:
    """Rest to rest in one segment is 3s² − 2s³."""
    made = controller()
    made.accept(Trajectory(JOINTS, 0.0, [2.0], np.ones((1, 3)), np.zeros((1, 3))), 0.0, ZERO)
    for s in (0.25, 0.5, 0.9):
        positions, velocities = made.sample(2 * s)
        np.testing.assert_allclose(positions, 3 * s**2 - 2 * s**3)
        np.testing.assert_allclose(velocities, (6 * s - 6 * s**2) / 2)


def test_accelerations_make_it_quintic() -> None:
    """Rest to rest in one segment is 10s³ − 15s⁴ + 6s⁵."""
    made = controller()
    zeros = np.zeros((1, 3))
    made.accept(Trajectory(JOINTS, 0.0, [2.0], np.ones((1, 3)), zeros, zeros), 0.0, ZERO)
    for s in (0.25, 0.5, 0.9):
        positions, velocities = made.sample(2 * s)
        np.testing.assert_allclose(positions, 10 * s**3 - 15 * s**4 + 6 * s**5)
        np.testing.assert_allclose(velocities, (30 * s**2 - 60 * s**3 + 30 * s**4) / 2)


@pytest.mark.parametrize("with_accelerations", [False, True])
@given(positions=points, velocities=points, accelerations=points)
@settings(max_examples=40, deadline=None)
def test_passes_through_its_points(
    positions: np.ndarray,
    velocities: np.ndarray,
    accelerations: np.ndarray,
    with_accelerations: bool,
) -> None:
    made = controller()
    sent = at_rest(positions, velocities, stamp_s=1.0)
    if with_accelerations:
        sent = Trajectory(
            JOINTS, 1.0, sent.times_from_start_s, positions, sent.velocities, accelerations
        )
    made.accept(sent, 1.0, ZERO)
    expected = np.asarray(sent.velocities)
    for k in range(4):
        for time_s in (1.1 + 0.1 * k - 1e-9, 1.1 + 0.1 * k + 1e-9):
            position, velocity = made.sample(time_s)
            np.testing.assert_allclose(position, positions[k], atol=1e-6)
            np.testing.assert_allclose(velocity, expected[k], atol=1e-4)
    np.testing.assert_array_equal(made.sample(50.0)[0], positions[-1])
    np.testing.assert_array_equal(made.sample(50.0)[1], ZERO)


@pytest.mark.parametrize("splice", [False, True])
@given(
    first=points,
    first_velocities=points,
    second=points,
    second_velocities=points,
    replaced_s=st.floats(0.01, 0.6),
    delay_s=st.floats(0.0, 0.3),
)
@settings(max_examples=60, deadline=None)
def test_replacement_is_continuous(
    splice: bool,
    first: np.ndarray,
    first_velocities: np.ndarray,
    second: np.ndarray,
    second_velocities: np.ndarray,
    replaced_s: float,
    delay_s: float,
) -> None:
    """In position and velocity, whenever the first point lies in the future."""
    made = controller(allow_trajectory_replacement=splice)
    made.accept(at_rest(first, first_velocities, stamp_s=0.0), 0.0, ZERO)
    before = made.sample(replaced_s)
    stamp_s = replaced_s + delay_s
    made.accept(at_rest(second, second_velocities, stamp_s), replaced_s, ZERO)
    for seam_s in (replaced_s, stamp_s):
        left, right = made.sample(seam_s - STEP_S), made.sample(seam_s + STEP_S)
        if seam_s == replaced_s:
            left, right = before, made.sample(seam_s)
        np.testing.assert_allclose(right[0], left[0], atol=5e-3)
        np.testing.assert_allclose(right[1], left[1], atol=0.5)
    np.testing.assert_allclose(made.sample(replaced_s)[0], before[0], atol=1e-12)
    np.testing.assert_allclose(made.sample(replaced_s)[1], before[1], atol=1e-9)
    np.testing.assert_allclose(made.sample(stamp_s + 0.4)[0], second[-1], atol=1e-6)


def ramp(stamp_s: float, offset: float = 0.0) -> Trajectory:
    """1 rad/s for one second from the stamp on, then at rest."""
    times = np.linspace(0.0, 1.0, 11)
    positions = np.repeat((times + offset)[:, None], 3, axis=1)
    velocities = np.ones((11, 3))
    velocities[-1] = 0.0
    return Trajectory(JOINTS, stamp_s, times, positions, velocities)


def test_a_future_stamp_bridges_at_once_by_default() -> None:
    """Humble, Jazzy and Kilted drop the running trajectory when the next one arrives."""
    made = controller()
    made.accept(ramp(10.0), 10.0, ZERO)
    stop = Trajectory(JOINTS, 10.8, [0.1], np.full((1, 3), 0.2), np.zeros((1, 3)))
    made.accept(stop, 10.2, ZERO)
    assert made.sample(10.79)[0][0] < 0.4
    np.testing.assert_allclose(made.sample(10.9)[0], 0.2)


def test_a_future_stamp_can_splice() -> None:
    """From 6.8 on the running trajectory goes on until the stamp."""
    made = controller(allow_trajectory_replacement=True)
    made.accept(ramp(10.0), 10.0, ZERO)
    stop = Trajectory(JOINTS, 10.5, [0.3], np.full((1, 3), 0.7), np.zeros((1, 3)))
    made.accept(stop, 10.2, ZERO)
    for time_s in (10.2, 10.25, 10.33, 10.5):
        position, velocity = made.sample(time_s)
        np.testing.assert_allclose(position, time_s - 10.0, atol=1e-9)
        np.testing.assert_allclose(velocity, 1.0, atol=1e-6)
    np.testing.assert_allclose(made.sample(11.0)[0], 0.7)


def test_points_in_the_past_are_cut_off() -> None:
    made = controller()
    made.accept(ramp(10.0), 10.5, ZERO)
    np.testing.assert_allclose(made.sample(10.5)[0], 0.5, atol=1e-9)
    np.testing.assert_allclose(made.sample(10.75)[0], 0.75, atol=1e-9)


def test_splicing_takes_a_past_stamp_for_now() -> None:
    made = controller(allow_trajectory_replacement=True)
    made.accept(ramp(10.0), 10.0, ZERO)
    made.accept(ramp(10.2, offset=0.2), 10.4, ZERO)
    np.testing.assert_allclose(made.sample(10.4)[0], 0.2, atol=1e-9)
    np.testing.assert_allclose(made.sample(11.4)[0], 1.2, atol=1e-9)


@given(order=st.permutations(range(3)), splice=st.booleans())
@settings(max_examples=12, deadline=None)
def test_joints_may_come_in_any_order(order: list[int], splice: bool) -> None:
    positions = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    velocities = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    made = controller(allow_trajectory_replacement=splice)
    names = [JOINTS[i] for i in order]
    sent = Trajectory(names, 0.0, [0.5, 1.0], positions[:, order], velocities[:, order])
    made.accept(sent, 0.0, ZERO)
    np.testing.assert_allclose(made.sample(0.5)[0], positions[0])
    np.testing.assert_allclose(made.sample(0.5)[1], velocities[0])
    np.testing.assert_allclose(made.sample(2.0)[0], positions[1])


def test_a_refused_trajectory_is_counted_and_changes_nothing() -> None:
    made = controller()
    made.accept(ramp(1.0), 1.0, ZERO)
    before = made.sample(1.5)
    moving = Trajectory(JOINTS, 0.0, [0.1], np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(TrajectoryRejected, match="velocity is not zero"):
        made.accept(moving, 1.2, ZERO)
    np.testing.assert_array_equal(made.sample(1.5), before)
    assert (made.accepted, made.rejected) == (1, 1)
    assert "velocity is not zero" in made.last_rejection
    allowing = controller(allow_nonzero_velocity_at_trajectory_end=True)
    allowing.accept(moving, 1.2, ZERO)
    assert allowing.accepted == 1


def test_hold_drops_the_trajectory() -> None:
    made = controller()
    made.accept(ramp(0.0), 0.0, ZERO)
    made.hold([0.3, 0.3, 0.3], 0.3)
    np.testing.assert_array_equal(made.sample(0.9)[0], [0.3, 0.3, 0.3])


@pytest.mark.parametrize("positions", [[0.0], [0.0, np.nan, 0.0]])
def test_hold_needs_every_joint(positions: list[float]) -> None:
    with pytest.raises(ValueError, match="3 finite positions"):
        controller().hold(positions, 0.0)


def test_joint_names_are_checked() -> None:
    with pytest.raises(ValueError, match="once each"):
        JointTrajectoryController(["elbow", "elbow"])
