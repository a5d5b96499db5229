"""Faults pinned: messages that joint_trajectory_controller rejects, a jump in position or velocity
where one trajectory replaces another, limits broken at a seam, motion after a hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pi05_ros.control import (
    ClockJumpedBackError,
    CommandStream,
    MotionLimiter,
    TrajectoryPoints,
    make_scheduler,
)
from pi05_ros.types import ActionChunk, FloatArray, JointGroup, JointSpec

settings = hypothesis_settings(max_examples=25, deadline=None)
DT_S = 0.02
JOINTS = JointGroup(
    [
        JointSpec("shoulder", -1.5, 1.5, 3.0, 10.0),
        JointSpec("wrist", -3.0, 3.0, 1.0, 30.0),
        JointSpec("finger", 0.0, 0.05, 0.1, 0.5, gripper=True),
    ]
)
HOME = np.array([0.0, 0.5, 0.02])
EPOCH_S = 1.76e9


def stream(lookahead_steps: int = 10, lead_s: float = 0.02) -> CommandStream:
    limiter = MotionLimiter(JOINTS, DT_S)
    return CommandStream(JOINTS, limiter, DT_S, lookahead_steps, lead_s)


def started(now_s: float = 0.0, **options: float) -> CommandStream:
    result = stream(**options)  # type: ignore[arg-type]
    result.start(HOME, now_s)
    return result


def standing(times_s: FloatArray) -> FloatArray:
    return np.tile(HOME, (len(times_s), 1))


def moving(times_s: FloatArray) -> FloatArray:
    waves = np.sin(3.0 * times_s[:, None] + [0.0, 1.0, 2.0])
    return HOME + waves * [0.5, 0.2, 0.01]


def sample(points: TrajectoryPoints, time_s: float) -> tuple[FloatArray, FloatArray]:
    """Position and velocity of the cubic through the points; at rest beyond the last."""
    times = points.stamp_s + points.times_from_start_s
    assert time_s >= times[0] - 1e-6
    if len(times) == 1 or time_s >= times[-1]:
        return points.positions[-1], points.velocities[-1]
    i = min(max(int(np.searchsorted(times, time_s, side="right")) - 1, 0), len(times) - 2)
    dt = points.times_from_start_s[i + 1] - points.times_from_start_s[i]
    u = (time_s - times[i]) / dt
    step = points.positions[i + 1] - points.positions[i]
    va, vb = points.velocities[i] * dt, points.velocities[i + 1] * dt
    c2, c3 = 3 * step - 2 * va - vb, va + vb - 2 * step
    return (
        points.positions[i] + u * (va + u * (c2 + u * c3)),
        (va + u * (2 * c2 + u * 3 * c3)) / dt,
    )


def assert_controller_accepts(points: TrajectoryPoints, now_s: float) -> None:
    """The checks of JointTrajectoryController::validate_trajectory_msg that concern us."""
    n = len(points.times_from_start_s)
    assert points.positions.shape == points.velocities.shape == (n, len(JOINTS))
    assert n >= 1
    assert points.times_from_start_s[0] == 0
    assert (np.diff(points.times_from_start_s) > 0).all()
    assert (points.velocities[-1] == 0).all()
    assert points.stamp_s + points.times_from_start_s[-1] >= now_s - 1e-6
    assert np.isfinite(points.positions).all()
    assert np.isfinite(points.velocities).all()


def assert_limits_hold(points: TrajectoryPoints) -> None:
    velocity, position = points.velocities, points.positions
    accelerations = np.diff(velocity, axis=0) / DT_S
    assert (np.abs(accelerations) <= JOINTS.max_acceleration * (1 + 1e-6)).all()
    assert (np.abs(velocity) <= JOINTS.max_velocity * (1 + 1e-9)).all()
    assert (position >= JOINTS.lower - 1e-9).all()
    assert (position <= JOINTS.upper + 1e-9).all()
    # Constant acceleration between the points, so these limits hold there too.
    np.testing.assert_allclose(
        np.diff(position, axis=0), DT_S / 2 * (velocity[1:] + velocity[:-1]), atol=1e-12
    )


@settings
@given(
    st.lists(st.tuples(st.floats(0.0, 0.07), st.integers(0, 4)), min_size=2, max_size=25),
    st.sampled_from([0.0, EPOCH_S]),
    st.sampled_from([0.0, 0.02, 0.035]),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_every_trajectory_is_accepted_limited_and_continues_the_one_before(
    ticks: list[tuple[float, int]], start_s: float, lead_s: float, lookahead: int, seed: int
) -> None:
    """Ticks at any distance, over targets that jump, vanish and turn NaN."""
    rng = np.random.default_rng(seed)
    jumps = rng.normal(size=(5, 3)) * 2
    jumps[3, 1] = math.nan
    commands = started(start_s, lookahead_steps=lookahead, lead_s=lead_s)
    now_s, before = start_s, None
    for gap_s, kind in ticks:
        now_s += gap_s

        def targets(times_s: FloatArray, kind: int = kind) -> FloatArray | None:
            return None if kind == 4 else np.tile(HOME + jumps[kind], (len(times_s), 1))

        points = commands.tick(now_s, targets)
        assert_controller_accepts(points, now_s)
        assert_limits_hold(points)
        assert points.stamp_s >= now_s + commands.transport_s - 1e-5
        if before is not None:
            last_s = max(now_s + lead_s, points.stamp_s)
            for time_s in np.linspace(points.stamp_s, last_s, 5):
                old, new = sample(before, time_s), sample(points, time_s)
                np.testing.assert_allclose(new[0], old[0], atol=1e-5)
                np.testing.assert_allclose(new[1], old[1], atol=1e-4)
        before = points


def assert_bridged_unseen(
    before: TrajectoryPoints, points: TrajectoryPoints, arrival_s: float
) -> None:
    """The cubic from the state on arrival to the first point is the old trajectory."""
    bridge = TrajectoryPoints(
        arrival_s,
        np.array([0.0, points.stamp_s - arrival_s]),
        np.stack((sample(before, arrival_s)[0], points.positions[0])),
        np.stack((sample(before, arrival_s)[1], points.velocities[0])),
    )
    for time_s in np.linspace(arrival_s, points.stamp_s - 1e-6, 5):
        old, new = sample(before, time_s), sample(bridge, time_s)
        np.testing.assert_allclose(new[0], old[0], atol=1e-5)
        np.testing.assert_allclose(new[1], old[1], atol=1e-3)


@settings
@given(
    st.lists(st.floats(-0.004, 0.004), min_size=5, max_size=25),
    st.floats(0.0002, 0.0055),
    st.sampled_from([0.005, 0.01, 0.02, 0.045]),
    st.sampled_from([0.0, EPOCH_S]),
)
def test_a_controller_that_replaces_on_arrival_sees_no_difference(
    jitter_s: list[float], transport_s: float, lead_s: float, start_s: float
) -> None:
    """Up to Kilted, a cubic leads from the state on arrival to the message's first point."""
    commands = started(start_s, lead_s=lead_s)
    before = commands.tick(start_s, moving)
    for k, late_s in enumerate(jitter_s, start=1):
        now_s = start_s + k * DT_S + late_s
        points = commands.tick(now_s, moving)
        arrival_s = now_s + transport_s
        if k > 3 and arrival_s < points.stamp_s:
            assert_bridged_unseen(before, points, arrival_s)
        else:
            assert k <= 3 or late_s + transport_s >= 0.009
        before = points


@settings
@given(
    st.lists(st.floats(0.0, 0.05), min_size=8, max_size=25),
    st.floats(0.0002, 0.0027),
    st.sampled_from([0.005, 0.02, 0.045]),
    st.sampled_from([0.0, EPOCH_S]),
)
def test_messages_between_ticks_are_kept_back_until_no_difference_can_be_seen(
    gaps_s: list[float], transport_s: float, lead_s: float, start_s: float
) -> None:
    """As above for messages at any time; fault: one that arrives a step before its first point."""
    commands = started(start_s, lead_s=lead_s)
    now_s = start_s
    before = commands.tick(now_s, moving)
    for gap_s in gaps_s:
        now_s += gap_s
        wait_s = commands.settled_in_s(now_s)
        assert 0 <= wait_s <= min(0.005, lead_s) + 1e-5
        now_s += wait_s
        assert commands.settled_in_s(now_s) == 0
        points = commands.tick(now_s, moving)
        arrival_s = now_s + transport_s
        if now_s > start_s + 4 * DT_S and arrival_s >= before.stamp_s:
            assert arrival_s < points.stamp_s < arrival_s + DT_S
            assert_bridged_unseen(before, points, arrival_s)
        before = points


def test_targets_are_followed_without_lag() -> None:
    commands = started()
    for k in range(150):
        commands.tick(k * DT_S + 0.003, moving)
        time_s = k * DT_S + 0.02
        if k > 50:
            position = commands.commanded(time_s).position
            np.testing.assert_allclose(position, moving(np.array([time_s]))[0], atol=1e-4)


def test_a_far_first_target_is_ramped_to() -> None:
    commands = started()
    far = np.array([1.0, 1.5, 0.04])
    first = commands.tick(0.0, lambda t: np.tile(far, (len(t), 1)))
    np.testing.assert_array_equal(first.positions[0], HOME)
    np.testing.assert_array_equal(first.velocities[0], 0)
    assert first.stamp_s >= 0.02
    for k in range(1, 150):
        assert_limits_hold(commands.tick(k * DT_S, lambda t: np.tile(far, (len(t), 1))))
    np.testing.assert_allclose(commands.commanded(3.0).position, far, atol=1e-6)
    assert commands.clamps.acceleration.all()
    assert commands.clamps.velocity.all()
    assert not commands.clamps.position.any()
    assert not commands.clamps.held.any()


def test_a_chunk_that_ends_in_motion_is_hardly_overrun() -> None:
    """Targets at 1 rad/s that stop at once: braking takes 0.05 rad, the preview spares most."""

    def ramp(times_s: FloatArray) -> FloatArray:
        travel = np.clip(times_s - 0.5, 0.0, 1.0)[:, None]
        return HOME + travel * [1.0, 0.0, 0.0]

    commands = started()
    reached = []
    for k in range(120):
        commands.tick(k * DT_S, ramp)
        reached.append(commands.commanded(k * DT_S + 0.02).position[0])
    assert max(reached) < 1.01
    assert reached[-1] == pytest.approx(1.0, abs=1e-6)
    assert min(reached[80:]) > 1.0 - 1e-6


def test_without_targets_the_joints_come_to_rest() -> None:
    commands = started()
    for k in range(50):
        commands.tick(k * DT_S, moving)
    before = commands.commanded(1.0).velocity
    assert np.abs(before).max() > 0.5
    points = commands.tick(1.0, lambda times_s: None)
    assert commands.active
    assert points.stamp_s + points.times_from_start_s[-1] == pytest.approx(commands.rest_time_s)
    assert (commands.commanded(commands.rest_time_s + DT_S).velocity == 0).all()
    rest = commands.commanded(9.0).position
    np.testing.assert_array_equal(commands.tick(9.0, lambda times_s: None).positions[-1], rest)


def test_hold_brakes_from_the_commanded_state_and_ends_the_stream() -> None:
    commands = started()
    assert commands.active
    for k in range(50):
        before = commands.tick(k * DT_S, moving)
    now_s = 50 * DT_S
    points = commands.hold(now_s)
    assert_controller_accepts(points, now_s)
    assert_limits_hold(points)
    for time_s in (now_s + 0.01, now_s + 0.02, now_s + 0.03):
        np.testing.assert_allclose(sample(points, time_s)[0], sample(before, time_s)[0], atol=1e-9)
        np.testing.assert_allclose(sample(points, time_s)[1], sample(before, time_s)[1], atol=1e-9)
    speed = np.abs(commands.commanded(now_s + 0.03).velocity) / JOINTS.max_acceleration
    assert commands.rest_time_s <= now_s + 0.03 + speed.max() + DT_S + 1e-9
    assert not commands.active
    with pytest.raises(RuntimeError, match="start"):
        commands.tick(now_s + DT_S, moving)
    again = commands.hold(now_s + DT_S)
    np.testing.assert_allclose(again.positions[-1], points.positions[-1], atol=1e-12)


def test_stop_ends_the_stream_without_a_word() -> None:
    commands = started()
    commands.tick(0.0, moving)
    rest_time_s = commands.rest_time_s
    commands.stop()
    assert not commands.active
    assert commands.rest_time_s == rest_time_s
    with pytest.raises(RuntimeError, match="start"):
        commands.tick(DT_S, moving)


def test_hold_before_any_tick_stays_at_the_measured_positions() -> None:
    points = started().hold(0.0)
    assert_controller_accepts(points, 0.0)
    np.testing.assert_array_equal(points.positions, np.tile(HOME, (len(points.positions), 1)))


def test_after_a_long_silence_it_goes_on_from_where_it_came_to_rest() -> None:
    commands = started()
    commands.tick(0.0, moving)
    rest = commands.commanded(commands.rest_time_s).position
    points = commands.tick(60.0, moving)
    assert_controller_accepts(points, 60.0)
    np.testing.assert_array_equal(points.positions[0], rest)
    np.testing.assert_array_equal(points.velocities[0], 0)
    assert_limits_hold(points)


def test_a_clock_that_jumps_back_is_reported_and_start_recovers() -> None:
    commands = started(100.0)
    commands.tick(101.0, moving)
    commands.tick(101.0 - DT_S, moving)
    for call in (lambda: commands.tick(100.5, moving), lambda: commands.hold(3.0)):
        with pytest.raises(ClockJumpedBackError, match="start again"):
            call()
    commands.start(HOME, 3.0)
    assert_controller_accepts(commands.tick(3.0, moving), 3.0)


def test_commanded_is_what_the_controller_interpolates() -> None:
    commands = started(EPOCH_S)
    for k in range(30):
        points = commands.tick(EPOCH_S + k * DT_S, moving)
    for time_s in EPOCH_S + np.linspace(0.6, 1.4, 50):
        state = commands.commanded(time_s)
        position, velocity = sample(points, time_s)
        np.testing.assert_allclose(state.position, position, atol=1e-5)
        np.testing.assert_allclose(state.velocity, velocity, atol=1e-4)


def test_clamps_are_counted_once_per_commanded_step() -> None:
    """Ten steps are planned per tick, one of them is commanded."""
    commands = started()

    def broken(times_s: FloatArray) -> FloatArray:
        wanted = standing(times_s)
        wanted[:, 0] = 9.0
        wanted[:, 1] = math.nan
        return wanted

    for k in range(21):
        commands.tick(k * DT_S, broken)
    assert commands.clamps.position.tolist() == [20, 0, 0]
    assert commands.clamps.held.tolist() == [0, 20, 0]


def test_a_published_trajectory_cannot_be_changed() -> None:
    points = started().tick(0.0, moving)
    with pytest.raises(ValueError, match="read-only"):
        points.positions[0] = 1.0


def test_chunks_that_disagree_reach_the_controller_within_the_limits() -> None:
    """Scheduler, limits and stream together, at 100 ms of latency and 1 rad between chunks."""
    rng = np.random.default_rng(0)
    for name in ("sync", "latest", "temporal_ensemble"):
        scheduler = make_scheduler(name, gripper=JOINTS.gripper)
        commands = started()
        for k in range(150):
            now_s = k * DT_S
            if k % 5 == 0:
                actions = HOME + rng.normal(size=(30, 3)).cumsum(axis=0) * 0.3
                scheduler.add(ActionChunk(actions, now_s - 0.1, DT_S), now_s)
            points = commands.tick(now_s, scheduler.targets)
            assert_controller_accepts(points, now_s)
            assert_limits_hold(points)
        assert np.abs(commands.commanded(3.0).position - HOME).max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CommandStream(JOINTS, MotionLimiter(JOINTS, 0.01), DT_S), "dt_s"),
        (lambda: stream(lookahead_steps=0), "lookahead_steps"),
        (lambda: stream(lead_s=-0.1), "lead_s"),
        (lambda: CommandStream(JOINTS, MotionLimiter(JOINTS, DT_S), DT_S, 10, 0.0, -1.0), "transp"),
        (lambda: stream().tick(0.0, moving), "start"),
        (lambda: stream().hold(0.0), "start"),
        (lambda: stream().commanded(0.0), "start"),
        (lambda: stream().start(np.array([0.0, math.nan, 0.0]), 0.0), "'wrist'"),
        (lambda: started().tick(0.0, lambda t: np.zeros((len(t), 4))), "shape"),
    ],
)
def test_misuse_gets_a_clear_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_a_limiter_for_other_joints_is_refused() -> None:
    other = JointGroup([JointSpec("tool", -1, 1, 1, 1)])
    with pytest.raises(ValueError, match="tool"):
        CommandStream(JOINTS, MotionLimiter(other, DT_S), DT_S)
