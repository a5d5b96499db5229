"""Faults pinned: a limit broken by some target sequence or between two points, overshoot, ringing,
lag behind a feasible reference, a NaN that moves a joint, clamps reported for rounding."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pi05_ros.control.limits import MotionLimiter, MotionState
from pi05_ros.types import FloatArray, JointGroup, JointSpec

settings = hypothesis_settings(max_examples=80, deadline=None)
periods = st.sampled_from([0.002, 0.01, 0.02, 0.1])


def joint(
    lower: float = -3.0, upper: float = 3.0, velocity: float = 3.0, acceleration: float = 10.0
) -> JointGroup:
    return JointGroup([JointSpec("elbow", lower, upper, velocity, acceleration)])


@st.composite
def groups(draw: st.DrawFn) -> JointGroup:
    specs = []
    for index in range(3):
        lower = draw(st.floats(-3, 1))
        specs.append(
            JointSpec(
                f"j{index}",
                lower,
                lower + draw(st.floats(0.01, 6)),
                draw(st.floats(0.05, 10)),
                draw(st.floats(0.1, 200)),
            )
        )
    return JointGroup(specs)


def admissible(limiter: MotionLimiter, place: FloatArray, haste: FloatArray) -> MotionState:
    """Anywhere inside the bounds, at a share `haste` in [-1, 1] of what can still be stopped."""
    position = limiter.lower + place * (limiter.upper - limiter.lower)
    room = np.where(haste > 0, limiter.upper - position, position - limiter.lower)
    acceleration = limiter.velocity_step / limiter.dt_s
    # Stopping on the grid takes at most a·dt²/8 more than v²/2a.
    room = np.maximum(room - acceleration * limiter.dt_s**2 / 8, 0)
    speed = np.minimum(np.sqrt(2 * acceleration * room), limiter.max_velocity)
    return MotionState(position, haste * speed)


def hermite(
    a: MotionState, b: MotionState, dt_s: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Position, velocity, acceleration of the cubic between two states at 21 times of it."""
    u = np.linspace(0, 1, 21)[:, None]
    step, va, vb = b.position - a.position, a.velocity * dt_s, b.velocity * dt_s
    c2, c3 = 3 * step - 2 * va - vb, va + vb - 2 * step
    return (
        a.position + u * (va + u * (c2 + u * c3)),
        (va + u * (2 * c2 + u * 3 * c3)) / dt_s,
        (2 * c2 + 6 * u * c3) / dt_s**2,
    )


def assert_limits_hold(limiter: MotionLimiter, states: list[MotionState]) -> None:
    for a, b in pairwise(states):
        position, velocity, acceleration = hermite(a, b, limiter.dt_s)
        assert (position >= limiter.lower - 1e-9).all()
        assert (position <= limiter.upper + 1e-9).all()
        assert (np.abs(velocity) <= limiter.max_velocity * (1 + 1e-6) + 1e-9).all()
        limit = limiter.velocity_step / limiter.dt_s
        # Taking the second difference of positions costs digits.
        assert (np.abs(acceleration) <= limit * (1 + 1e-6) + 1e-13 / limiter.dt_s**2).all()


def follow(
    limiter: MotionLimiter,
    state: MotionState,
    targets: FloatArray,
    velocity: FloatArray | float = 0,
) -> list[MotionState]:
    positions, velocities, _ = limiter.follow(state, targets, np.zeros_like(targets) + velocity)
    return [state, *(MotionState(*row) for row in zip(positions, velocities, strict=True))]


triples = st.tuples(*[st.floats(0, 1)] * 3).map(np.array)
any_triples = st.tuples(*[st.floats()] * 3).map(np.array)


@settings
@given(
    groups(),
    periods,
    st.floats(0, 0.4),
    st.floats(0.01, 1),
    triples,
    triples,
    st.lists(st.tuples(any_triples, any_triples), min_size=1, max_size=25),
)
def test_limits_hold_for_any_targets_from_any_admissible_state(
    joints: JointGroup,
    dt_s: float,
    margin: float,
    gain: float,
    place: FloatArray,
    haste: FloatArray,
    requests: list[tuple[FloatArray, FloatArray]],
) -> None:
    limiter = MotionLimiter(joints, dt_s, margin, gain)
    states = [admissible(limiter, place, 2 * haste - 1)]
    for target, velocity in requests:
        states.append(limiter.step(states[-1], target, velocity)[0])
    positions, velocities = limiter.brake_to_rest(states[-1])
    states += [MotionState(*row) for row in zip(positions, velocities, strict=True)][:50]
    assert_limits_hold(limiter, states)


@settings
@given(
    groups(),
    periods,
    triples,
    triples,
    st.lists(st.tuples(any_triples, any_triples), min_size=1, max_size=12),
)
def test_steps_in_one_call_are_the_steps_one_by_one(
    joints: JointGroup,
    dt_s: float,
    place: FloatArray,
    haste: FloatArray,
    requests: list[tuple[FloatArray, FloatArray]],
) -> None:
    """Pins: a step that begins elsewhere than the one before it ended, a NaN that spreads."""
    limiter = MotionLimiter(joints, dt_s)
    state = admissible(limiter, place, 2 * haste - 1)
    targets, velocities = (np.array(column) for column in zip(*requests, strict=True))
    positions, speeds, clamps = limiter.follow(state, targets, velocities)
    for k, (target, velocity) in enumerate(requests):
        state, clamped = limiter.step(state, target, velocity)
        np.testing.assert_array_equal(positions[k], state.position)
        np.testing.assert_array_equal(speeds[k], state.velocity)
        for kind, one in zip(clamps, clamped, strict=True):
            np.testing.assert_array_equal(kind[k], one)


@settings
@given(groups(), periods, st.integers(0, 2**32 - 1))
def test_limits_hold_where_targets_push_against_them(
    joints: JointGroup, dt_s: float, seed: int
) -> None:
    """Long pushes at full speed into one bound, then into the other.

    A target at the bound with a velocity that leads beyond it leaves the bound alone to brake.
    """
    rng = np.random.default_rng(seed)
    limiter = MotionLimiter(joints, dt_s)
    signs = rng.choice(np.array([-1.0, 1.0]), size=(8, 1, 3))
    sides: FloatArray = signs.repeat(20, axis=1).reshape(-1, 3).astype(np.float64)
    targets = np.where(sides > 0, joints.upper, joints.lower)
    middle = limiter.at_rest((joints.lower + joints.upper) / 2)
    assert_limits_hold(limiter, follow(limiter, middle, targets, 1e9 * sides))


@hypothesis_settings(settings, max_examples=40)
@given(
    st.floats(0.2, 10),
    st.floats(0.5, 200),
    st.sampled_from([0.01, 0.02, 0.1]),
    st.floats(0.05, 1),
    st.floats(-2.9, 2.9),
)
def test_a_step_converges_without_overshoot_or_ringing(
    velocity: float, acceleration: float, dt_s: float, gain: float, target: float
) -> None:
    limiter = MotionLimiter(joint(-3, 3, velocity, acceleration), dt_s, tracking_gain=gain)
    distance = abs(target)
    travel_s = distance / velocity + velocity / acceleration + 2 * math.sqrt(distance)
    settle_s = 3 * math.sqrt(distance / acceleration) + 25 * dt_s / gain
    steps = int((travel_s + settle_s) / dt_s)
    states = follow(limiter, limiter.at_rest(np.zeros(1)), np.full((steps, 1), target))
    way = np.array([state.position[0] for state in states]) * math.copysign(1, target)
    assert way.max() <= distance + 1e-9
    assert np.diff(way).min() >= -1e-12
    assert distance - way[-1] < 1e-6 + 1e-3 * distance


def test_a_step_is_fast() -> None:
    """Within two steps of full acceleration followed by braking with 0.7 of it, 0.493 s."""
    limiter = MotionLimiter(joint(velocity=100.0), 0.02, tracking_gain=1.0)
    states = follow(limiter, limiter.at_rest(np.zeros(1)), np.full((40, 1), 0.5))
    arrived = next(i for i, state in enumerate(states) if state.position[0] > 0.5 - 1e-6)
    assert arrived * 0.02 <= math.sqrt(2 * 0.5 / 10 * (1 + 1 / 0.7)) + 0.04


def test_a_feasible_reference_is_followed_without_lag_or_clamps() -> None:
    limiter = MotionLimiter(joint(), 0.02)
    omega = np.pi
    state = MotionState(np.zeros(1), np.array([0.5 * omega]))
    for k in range(1, 200):
        phase = omega * 0.02 * k
        target, velocity = 0.5 * np.sin([phase]), 0.5 * omega * np.cos([phase])
        state, clamps = limiter.step(state, target, velocity)
        assert abs(state.position[0] - target[0]) < 1e-4
        assert not np.concatenate(clamps).any()


@settings
@given(st.floats(-0.5, 0.5), st.floats(-2.0, 2.0))
def test_a_moving_target_is_caught_up_with(offset: float, speed: float) -> None:
    limiter = MotionLimiter(joint(-100, 100), 0.02)
    targets = offset + speed * 0.02 * np.arange(1.0, 150.0)[:, None]
    state = follow(limiter, limiter.at_rest(np.zeros(1)), targets, speed)[-1]
    np.testing.assert_allclose(state.position, targets[-1], atol=1e-9)
    np.testing.assert_allclose(state.velocity, speed, atol=1e-7)


@settings
@given(st.floats(0, 0.5), st.floats(0, 3.0), st.sampled_from([-1.0, 1.0]), st.floats(-1, 1))
def test_a_joint_beyond_its_limit_comes_back_and_goes_no_further_than_it_must(
    excess: float, speed: float, side: float, target: float
) -> None:
    limiter = MotionLimiter(joint(-1, 1), 0.02)
    state = MotionState(np.array([side * (1 + excess)]), np.array([side * speed]))
    states = follow(limiter, state, np.full((300, 1), target))
    stop = 1 + excess + speed**2 / 20 + 10 * 0.02**2 / 8
    assert max(side * s.position[0] for s in states) <= stop + 1e-9
    assert abs(states[-1].position[0]) <= 1 + 1e-9
    changes = np.diff([s.velocity[0] for s in states])
    assert np.abs(changes).max() <= limiter.velocity_step[0] * (1 + 1e-9)


def test_a_joint_waits_at_its_limit_for_a_target_that_comes_back() -> None:
    limiter = MotionLimiter(joint(-1, 1), 0.02)
    state, clamps = limiter.step(
        limiter.at_rest(np.array([1.0])), np.array([1.1]), np.array([-2.0])
    )
    assert (state.position[0], state.velocity[0]) == (1.0, 0.0)
    assert clamps.position[0]


def test_a_joint_beyond_its_limit_stays_there_without_a_target() -> None:
    limiter = MotionLimiter(joint(-1, 1), 0.02)
    state, clamps = limiter.step(limiter.at_rest(np.array([1.2])), np.array([math.nan]))
    assert (state.position[0], state.velocity[0]) == (1.2, 0.0)
    assert clamps.held[0]


def test_too_fast_a_joint_brakes_with_full_acceleration() -> None:
    limiter = MotionLimiter(joint(-100, 100), 0.02)
    state = MotionState(np.zeros(1), np.array([4.0]))
    speeds = [s.velocity[0] for s in follow(limiter, state, np.full((10, 1), 90.0))]
    np.testing.assert_allclose(speeds[:6], [4.0, 3.8, 3.6, 3.4, 3.2, 3.0])
    np.testing.assert_allclose(speeds[6:], 3.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["target", "velocity"])
def test_a_non_finite_value_brakes_its_joint_alone(bad: float, where: str) -> None:
    joints = JointGroup([JointSpec("a", -3, 3, 3, 10), JointSpec("b", -3, 3, 3, 10)])
    limiter = MotionLimiter(joints, 0.02)
    state = MotionState(np.zeros(2), np.array([1.0, 1.0]))
    target, velocity = np.array([0.02, 0.02]), np.array([1.0, 1.0])
    (target if where == "target" else velocity)[0] = bad
    state, clamps = limiter.step(state, target, velocity)
    np.testing.assert_allclose(state.velocity, [0.8, 1.0])
    assert clamps.held.tolist() == [True, False]


def test_clamps_name_the_limit_that_bound() -> None:
    """A far target: limited by acceleration, then by velocity; braking in time is no clamp."""
    limiter = MotionLimiter(joint(velocity=1.0), 0.02)
    state, seen = limiter.at_rest(np.zeros(1)), []
    for _ in range(100):
        state, clamps = limiter.step(state, np.array([1.0]))
        assert not clamps.position[0]
        seen.append((bool(clamps.velocity[0]), bool(clamps.acceleration[0])))
    assert seen[0] == (True, True)
    assert seen[20] == (True, False)
    assert (False, True) not in seen
    assert seen[-1] == (False, False)


def test_a_target_beyond_the_position_limit_is_a_position_clamp() -> None:
    limiter = MotionLimiter(joint(-1, 1), 0.02, position_margin=0.1)
    for target, clamped in ((0.8, False), (0.8 + 1e-9, False), (0.81, True), (-0.81, True)):
        state = limiter.at_rest(np.array([math.copysign(0.8, target)]))
        state, clamps = limiter.step(state, np.array([target]))
        assert clamps.position[0] == clamped
        np.testing.assert_allclose(np.abs(state.position), 0.8)


def test_grippers_have_no_position_margin() -> None:
    """Pins: a gripper that closes to 0.784 of 0.8 rad because its end is kept free."""
    joints = JointGroup(
        [
            JointSpec("elbow", -1.0, 1.0, 3.0, 10.0),
            JointSpec("hand", 0.0, 0.8, 1.0, 5.0, gripper=True),
        ]
    )
    limiter = MotionLimiter(joints, 0.02, position_margin=0.02)
    state = limiter.at_rest(np.array([0.0, 0.4]))
    for end, reached in ((9.0, [0.96, 0.8]), (-9.0, [-0.96, 0.0])):
        for _ in range(150):
            state, _ = limiter.step(state, np.full(2, end))
        np.testing.assert_allclose(state.position, reached, atol=1e-9)


@settings
@given(groups(), periods, triples, triples)
def test_braking_ends_at_exactly_zero(
    joints: JointGroup, dt_s: float, place: FloatArray, haste: FloatArray
) -> None:
    limiter = MotionLimiter(joints, dt_s)
    state = admissible(limiter, place, 2 * haste - 1)
    positions, velocities = limiter.brake_to_rest(state)
    assert (velocities[-1] == 0).all()
    speed = np.maximum(np.abs(state.velocity) - limiter.velocity_step, 0)
    velocity = np.copysign(speed, state.velocity)
    np.testing.assert_allclose(velocities[0], velocity, atol=1e-12)
    moved = dt_s / 2 * (state.velocity + velocity)
    np.testing.assert_allclose(positions[0], state.position + moved, atol=1e-12)
    assert len(positions) <= 1 + math.ceil((np.abs(state.velocity) / limiter.velocity_step).max())


def test_rounding_leaves_no_velocity_at_the_end() -> None:
    """The controller rejects a trajectory whose last velocity is not zero."""
    limiter = MotionLimiter(joint(), 0.02)
    state = MotionState(np.zeros(1), 3 * limiter.velocity_step * (1 + 1e-10))
    _, velocities = limiter.brake_to_rest(state)
    assert len(velocities) == 3
    assert velocities[-1] == 0


def test_bad_input_is_refused() -> None:
    for dt_s in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="dt_s"):
            MotionLimiter(joint(), dt_s)
    for margin in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="position_margin"):
            MotionLimiter(joint(), 0.02, margin)
    for gain in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="tracking_gain"):
            MotionLimiter(joint(), 0.02, tracking_gain=gain)
    limiter = MotionLimiter(joint(), 0.02)
    with pytest.raises(ValueError, match="'elbow'"):
        limiter.at_rest(np.array([math.nan]))
    with pytest.raises(ValueError, match="1 joint positions"):
        limiter.at_rest(np.zeros(2))
    with pytest.raises(ValueError, match="1 targets"):
        limiter.step(limiter.at_rest(np.zeros(1)), np.zeros(2))
    with pytest.raises(ValueError, match="1 velocities"):
        limiter.step(limiter.at_rest(np.zeros(1)), np.zeros(1), np.zeros(2))
