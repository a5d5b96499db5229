"""Faults pinned: messages that joint_trajectory_controller rejects, a jump in position or velocity
where one trajectory replaces another, limits broken at a chunk boundary, motion after braking,
messages that begin in the future and so are bridged. The controller's side: test_streams."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.scheduler import make_scheduler
from pi05_ros.control.trajectory import ClockJumpedBackError, CommandStream, TrajectoryPoints
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
PAST_S = 0.02
"""How far before its publication a message begins at least."""


def stream(lookahead_steps: int = 10, lead_s: float = 0.02) -> CommandStream:
    limiter = MotionLimiter(JOINTS, DT_S)
    return CommandStream(limiter, lookahead_steps, lead_s)


def started(now_s: float = 0.0, **options: float) -> CommandStream:
    result = stream(**options)  # type: ignore[arg-type]
    result.start(HOME, now_s)
    return result


def standing(times_s: FloatArray) -> FloatArray:
    return np.tile(HOME, (len(times_s), 1))


def resting_at(target: FloatArray) -> Callable[[FloatArray], FloatArray]:
    return lambda times_s: np.tile(target, (len(times_s), 1))


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
        if before is not None:
            assert points.stamp_s <= max(now_s - PAST_S, before.stamp_s) + 1e-5
            for time_s in np.linspace(points.stamp_s, max(now_s + lead_s, points.stamp_s), 5):
                old, new = sample(before, time_s), sample(points, time_s)
                np.testing.assert_allclose(new[0], old[0], atol=1e-5)
                np.testing.assert_allclose(new[1], old[1], atol=1e-4)
        before = points


@settings
@given(
    st.lists(st.floats(0.0, 0.05), min_size=8, max_size=25),
    st.sampled_from([0.0, 0.02, 0.045]),
    st.sampled_from([0.0, EPOCH_S]),
)
def test_a_message_begins_before_its_publication_on_the_commanded_motion(
    gaps_s: list[float], lead_s: float, start_s: float
) -> None:
    """Ticks and messages between them. Fault: a first point in the future, which controllers
    bridge from another state than the commanded one."""
    commands = started(start_s, lead_s=lead_s)
    now_s = start_s
    for gap_s in gaps_s:
        now_s += gap_s
        points = commands.tick(now_s, moving)
        if now_s < start_s + lead_s + PAST_S + 2 * DT_S:
            continue
        assert now_s - PAST_S - DT_S < points.stamp_s + 1e-5 <= now_s - PAST_S + 2e-5
        for time_s in np.linspace(points.stamp_s, now_s + lead_s, 5):
            state = commands.commanded(time_s)
            position, velocity = sample(points, time_s)
            np.testing.assert_allclose(position, state.position, atol=1e-5)
            np.testing.assert_allclose(velocity, state.velocity, atol=1e-4)


def test_the_first_message_begins_at_rest_at_the_measured_positions_ahead() -> None:
    """A controller that holds something else has until then to move there."""
    commands = started(lead_s=0.03)
    points = commands.tick(0.0, moving)
    assert points.stamp_s == pytest.approx(0.032)
    np.testing.assert_array_equal(points.positions[0], HOME)
    np.testing.assert_array_equal(points.velocities[0], 0.0)
    again = commands.tick(DT_S, moving)
    assert again.stamp_s == points.stamp_s
    np.testing.assert_array_equal(again.positions[:2], points.positions[:2])


def at_rest_after_a_motion() -> tuple[CommandStream, FloatArray]:
    commands = started()
    for k in range(20):
        commands.tick(k * DT_S, moving)
    return commands, commands.brake(20 * DT_S).positions[-1]


def test_a_start_near_the_last_rest_continues_it_without_a_step() -> None:
    """Gravity keeps the measured joints off what the controller still commands.

    Pins: a step of the command, by that difference, at each resume.
    """
    commands, rest = at_rest_after_a_motion()
    commands.start(rest + 0.9 * JOINTS.max_velocity * DT_S * [1.0, -1.0, 1.0], 2.0)
    points = commands.tick(2.0, moving)
    assert 2.0 - PAST_S - DT_S < points.stamp_s <= 2.0 - PAST_S + 1e-9
    np.testing.assert_array_equal(points.positions[0], rest)
    np.testing.assert_array_equal(points.velocities[0], 0.0)
    np.testing.assert_array_equal(commands.commanded(1.5).position, rest)
    assert_limits_hold(points)


def test_a_start_elsewhere_begins_at_the_measured_positions() -> None:
    """One joint was moved by hand; or the controllers no longer command the last rest."""
    commands, rest = at_rest_after_a_motion()
    moved = rest + np.array([0.0, 0.03, 0.0])
    commands.start(moved, 2.0)
    np.testing.assert_array_equal(commands.tick(2.0, moving).positions[0], moved)
    commands, rest = at_rest_after_a_motion()
    commands.reset()
    commands.start(rest + 0.001, 2.0)
    np.testing.assert_array_equal(commands.tick(2.0, moving).positions[0], rest + 0.001)


def test_a_motion_that_was_never_published_is_not_continued() -> None:
    commands = started()
    commands.tick(0.0, standing)
    commands.retract()
    commands.stop()
    commands.start(HOME + 0.001, 2.0)
    np.testing.assert_array_equal(commands.tick(2.0, moving).positions[0], HOME + 0.001)


def test_in_time_is_until_a_trajectory_leaves_the_one_before() -> None:
    """Pins: trajectories that were sent 57 and 210 ms after the states that they change."""
    commands = started(lead_s=0.03)
    with pytest.raises(RuntimeError, match="start"):
        stream().in_time(0.0)
    before = commands.tick(0.0, moving)
    for k in range(1, 20):
        now_s = k * DT_S
        away = HOME + 0.3 * (-1) ** k
        points = commands.tick(now_s, resting_at(away))
        assert commands.in_time(now_s)
        left_s = next(t for t in np.arange(now_s, 9.0, 1e-3).tolist() if not commands.in_time(t))
        assert now_s + 0.03 <= left_s + commands.transport_s <= now_s + 0.03 + DT_S + 2e-3
        same_s, other_s = left_s + commands.transport_s - 2e-3, left_s + DT_S
        np.testing.assert_allclose(sample(points, same_s), sample(before, same_s), atol=1e-9)
        assert not np.allclose(sample(points, other_s), sample(before, other_s), atol=1e-9)
        before = points


@settings
@given(
    st.lists(st.tuples(st.floats(0.0, 0.07), st.sampled_from("tth"), st.booleans()), max_size=20),
    st.integers(0, 2**32 - 1),
)
def test_a_retracted_trajectory_leaves_no_trace(
    calls: list[tuple[float, str, bool]], seed: int
) -> None:
    """Two streams: one makes extra trajectories that are retracted, ticks and holds."""
    rng = np.random.default_rng(seed)
    streams = (started(), started())
    now_s = 0.0
    for gap_s, call, retracted in calls:
        now_s += gap_s
        wanted = HOME + rng.normal(size=3)
        extra = HOME + rng.normal(size=3)

        def act(commands: CommandStream, wanted: FloatArray, call: str = call) -> TrajectoryPoints:
            if call == "h":
                return commands.brake(now_s)  # noqa: B023
            return commands.tick(now_s, lambda t: np.tile(wanted, (len(t), 1)))  # noqa: B023

        if call == "t" and not streams[0].active:
            for commands in streams:
                now_s = max(now_s, commands.rest_time_s + 0.1)
                commands.start(HOME, now_s)
        if retracted:
            act(streams[1], extra)
            streams[1].retract()
        first, second = (act(commands, wanted) for commands in streams)
        assert first.stamp_s == second.stamp_s
        np.testing.assert_array_equal(first.positions, second.positions)
        np.testing.assert_array_equal(first.velocities, second.velocities)
        assert streams[0].active == streams[1].active
        for kind in ("position", "velocity", "acceleration", "held"):
            counts = [getattr(commands.clamps, kind).tolist() for commands in streams]
            assert counts[0] == counts[1]


def test_only_a_trajectory_that_was_made_can_be_retracted() -> None:
    commands = started()
    with pytest.raises(RuntimeError, match="retract"):
        commands.retract()
    commands.tick(0.0, moving)
    commands.retract()
    with pytest.raises(RuntimeError, match="retract"):
        commands.retract()
    commands.tick(0.0, moving)
    commands.stop()
    with pytest.raises(RuntimeError, match="retract"):
        commands.retract()
    assert not commands.active


def test_the_commanded_motion_is_known_for_a_second() -> None:
    """For a comparison with measured positions, which are late; hold and stop do not end it."""
    commands = started()
    seen = []
    for k in range(150):
        now_s = k * DT_S
        commands.tick(now_s, lambda t: moving(t) + 0.2 * np.sin(20 * t)[:, None])
        seen.append((now_s, commands.commanded(now_s)))
        for then_s, state in seen[-50::7]:
            known = commands.commanded(then_s)
            np.testing.assert_allclose(known.position, state.position, atol=1e-12)
            np.testing.assert_allclose(known.velocity, state.velocity, atol=1e-12)
    commands.brake(3.0)
    commands.stop()
    for then_s, state in seen[-50:]:
        np.testing.assert_allclose(commands.commanded(then_s).position, state.position, atol=1e-12)
    rest_s = commands.rest_time_s
    for time_s in (rest_s, rest_s + 0.001, rest_s + 100.0):
        assert (commands.commanded(time_s).velocity == 0).all()
        np.testing.assert_array_equal(
            commands.commanded(time_s).position, commands.commanded(rest_s).position
        )


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


def test_brake_starts_at_the_commanded_state_and_ends_the_stream() -> None:
    commands = started()
    assert commands.active
    for k in range(50):
        before = commands.tick(k * DT_S, moving)
    now_s = 50 * DT_S
    points = commands.brake(now_s)
    assert_controller_accepts(points, now_s)
    assert_limits_hold(points)
    for time_s in (now_s, now_s + 0.01, now_s + commands.lead_s):
        np.testing.assert_allclose(sample(points, time_s)[0], sample(before, time_s)[0], atol=1e-9)
        np.testing.assert_allclose(sample(points, time_s)[1], sample(before, time_s)[1], atol=1e-9)
    speed = np.abs(commands.commanded(now_s + 0.03).velocity) / JOINTS.max_acceleration
    assert commands.rest_time_s <= now_s + 0.03 + speed.max() + DT_S + 1e-9
    assert not commands.active
    with pytest.raises(RuntimeError, match="start"):
        commands.tick(now_s + DT_S, moving)
    again = commands.brake(now_s + DT_S)
    np.testing.assert_allclose(again.positions[-1], points.positions[-1], atol=1e-12)


def test_stop_ends_the_stream_without_a_trajectory() -> None:
    commands = started()
    commands.tick(0.0, moving)
    rest_time_s = commands.rest_time_s
    commands.stop()
    assert not commands.active
    assert commands.rest_time_s == rest_time_s
    with pytest.raises(RuntimeError, match="start"):
        commands.tick(DT_S, moving)


def test_brake_before_any_tick_stays_at_the_measured_positions() -> None:
    points = started().brake(0.0)
    assert_controller_accepts(points, 0.0)
    np.testing.assert_array_equal(points.positions, np.tile(HOME, (len(points.positions), 1)))


def test_after_a_long_silence_it_continues_from_where_it_came_to_rest() -> None:
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
    for call in (lambda: commands.tick(100.5, moving), lambda: commands.brake(3.0)):
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
        (lambda: stream(lookahead_steps=0), "lookahead_steps"),
        (lambda: stream(lead_s=-0.1), "lead_s"),
        (lambda: stream().tick(0.0, moving), "start"),
        (lambda: stream().brake(0.0), "start"),
        (lambda: stream().commanded(0.0), "start"),
        (lambda: stream().start(np.array([0.0, math.nan, 0.0]), 0.0), "'wrist'"),
        (lambda: started().tick(0.0, lambda t: np.zeros((len(t), 4))), "shape"),
    ],
)
def test_misuse_gets_a_clear_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()
