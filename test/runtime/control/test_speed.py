"""Faults pinned: a jump in position or velocity when the speed changes, a plan that creeps at speed
0, steps of an old observation read at another speed; a first command at full speed to a far target,
a refusal without the joint's name; a filter that restarts with every tick, overshoots, or reports
another lag than it has."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.control.speed import LowPassFilter, SpeedScaler, StartRamp
from pi05_ros.types import FloatArray, JointGroup, JointSpec

NOW_S = 1.7e9


def test_at_full_speed_the_plans_time_is_the_clocks() -> None:
    scaler = SpeedScaler()
    for time_s in (0.0, NOW_S + 0.1234567, -3.0):
        assert scaler.plan_s(time_s) == time_s


def test_zero_stands_still_after_the_ramp() -> None:
    scaler = SpeedScaler(ramp_s=0.5)
    scaler.set_scale(0.0, NOW_S)
    assert scaler.rate(NOW_S) == 1.0
    assert scaler.rate(NOW_S + 0.25) == pytest.approx(0.5, abs=1e-6)
    assert scaler.rate(NOW_S + 0.5) == 0.0
    stands = scaler.plan_times_s(NOW_S + np.linspace(0.5, 100.0, 50))
    assert np.ptp(stands) == 0.0
    assert stands[0] == pytest.approx(NOW_S + 0.25, abs=1e-6)


def test_times_before_a_change_keep_their_place() -> None:
    """An observation that was made at full speed stays where it was in the plan."""
    scaler = SpeedScaler()
    scaler.set_scale(0.25, NOW_S)
    scaler.set_scale(1.0, NOW_S + 5.0)
    assert scaler.plan_s(NOW_S - 0.3) == pytest.approx(NOW_S - 0.3, abs=1e-6)
    before, after = scaler.plan_times_s([NOW_S + 4.0, NOW_S + 4.4])
    assert after - before == pytest.approx(0.1, abs=1e-6)


def test_a_scaler_reset_begins_at_the_scale() -> None:
    scaler = SpeedScaler(0.5)
    scaler.set_scale(0.2, NOW_S)
    scaler.reset()
    assert scaler.rate(NOW_S) == 0.2
    assert scaler.plan_s(NOW_S + 1.0) - scaler.plan_s(NOW_S) == pytest.approx(0.2, abs=1e-6)


@given(
    changes=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 2.0)), min_size=1, max_size=40),
    ramp_s=st.floats(0.05, 2.0),
)
@settings(max_examples=50, deadline=None)
def test_any_changes_of_speed_are_continuous(
    changes: list[tuple[float, float]], ramp_s: float
) -> None:
    """The plan never goes back, never faster than the clock, and its rate has no jump."""
    scaler = SpeedScaler(ramp_s=ramp_s)
    now_s = 1000.0
    for scale, wait_s in changes:
        before_s, rate = scaler.plan_s(now_s), scaler.rate(now_s)
        scaler.set_scale(scale, now_s)
        assert scaler.plan_s(now_s) == pytest.approx(before_s, abs=1e-9)
        assert scaler.rate(now_s) == pytest.approx(rate, abs=1e-9)
        times_s = now_s + np.linspace(0.0, max(wait_s, 0.01), 20)
        steps_s = np.diff(scaler.plan_times_s(times_s))
        assert (steps_s >= -1e-9).all()
        assert (steps_s <= np.diff(times_s) + 1e-9).all()
        rates = np.array([scaler.rate(float(t)) for t in times_s])
        assert (np.abs(np.diff(rates)) <= np.diff(times_s) / ramp_s + 1e-9).all()
        now_s += wait_s


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan")])
def test_scales_out_of_range_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="speed_scale"):
        SpeedScaler().set_scale(scale, NOW_S)
    with pytest.raises(ValueError, match="speed_scale"):
        SpeedScaler(scale)


@pytest.mark.parametrize("ramp_s", [-1.0, float("inf")])
def test_ramp_times_out_of_range_are_refused(ramp_s: float) -> None:
    with pytest.raises(ValueError, match="speed_ramp_s"):
        SpeedScaler(ramp_s=ramp_s)


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Threads alternate as often as the interpreter can."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("fast_switches")
def test_a_scaler_can_be_read_while_another_thread_resets_it() -> None:
    """Pins: an IndexError or a mutated deque in the thread that reads, which ended the node."""
    scaler = SpeedScaler(0.5)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            scaler.reset()
            scaler.set_scale(0.5, NOW_S)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20_000):
            assert scaler.rate(NOW_S) == 0.5
            assert scaler.plan_s(NOW_S) == 0.5 * NOW_S
    finally:
        stop.set()
        writer.join()


def test_the_oldest_changes_of_speed_are_dropped() -> None:
    scaler = SpeedScaler(ramp_s=0.0)
    for k in range(1000):
        scaler.set_scale(k % 2, float(k))
    assert scaler.plan_s(1000.0) == pytest.approx(500.0)
    assert scaler.plan_s(990.5) == pytest.approx(495.0)


JOINTS = JointGroup(
    [
        JointSpec("waist", -3.0, 3.0, 2.0, 10.0),
        JointSpec("elbow", -3.0, 3.0, 1.0, 10.0),
        JointSpec("grip", 0.0, 0.06, 0.15, 2.0, gripper=True),
    ]
)
HERE = np.array([0.0, 0.5, 0.0])


def there(waist: float, elbow: float, grip: float = 0.0) -> np.ndarray:
    """So far from here."""
    return HERE + np.array([waist, elbow, grip])


def test_a_near_target_is_followed_at_once() -> None:
    start_ramp = StartRamp(JOINTS)
    target = there(0.5, -0.5, 0.06)
    assert start_ramp.begin(HERE, target, 10.0) is None
    ramped = np.tile(target, (3, 1))
    assert start_ramp.apply(np.array([10.02, 10.04, 10.06]), ramped) is ramped


def test_a_far_target_is_refused_by_name() -> None:
    start_ramp = StartRamp(JOINTS, "refuse")
    refusal = start_ramp.begin(HERE, there(0.6, -1.0), 10.0)
    assert refusal is not None
    assert "'elbow' is at 0.500 and would go to -0.500, limit 0.5" in refusal
    assert "faults.first_command" in refusal


@given(
    away=st.tuples(*[st.floats(-5.0, 5.0)] * 2),
    speed=st.floats(0.05, 1.0),
)
def test_a_ramp_keeps_its_share_of_the_velocity_limits(
    away: tuple[float, float], speed: float
) -> None:
    start_ramp = StartRamp(JOINTS, "ramp", 0.5, speed)
    target = there(*away, 0.06)
    assert start_ramp.begin(HERE, target, 10.0) is None
    far = max(np.abs(away)) > 0.5
    times_s = np.linspace(10.0, 14.999, 5000)
    ramped = start_ramp.apply(times_s, np.tile(target, (len(times_s), 1)))
    assert (ramped[:, 2] == target[2]).all()
    if far:
        velocity = np.abs(np.diff(ramped[:, :2], axis=0)) / 0.001
        assert (velocity <= speed * JOINTS.max_velocity[:2] + 1e-6).all()
        assert np.allclose(ramped[0, :2], HERE[:2])
    arrived = start_ramp.apply(np.array([1000.0]), target[None])
    assert (arrived == target).all()


@pytest.mark.parametrize(
    ("mode", "distance", "speed", "message"),
    [
        ("jump", 0.5, 0.2, "ramp, refuse"),
        ("ramp", -1.0, 0.2, "first_command_distance"),
        ("ramp", 0.5, 0.0, "first_command_speed"),
    ],
)
def test_a_start_ramp_out_of_range_is_refused(
    mode: str, distance: float, speed: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StartRamp(JOINTS, mode, distance, speed)


DT_S = 0.02


def step_at_zero(times_s: FloatArray) -> FloatArray:
    return np.where(times_s >= -DT_S / 2, 1.0, 0.0)[:, None]


def follow(low_pass: LowPassFilter, until_s: float, ahead: int = 12) -> FloatArray:
    """The first value of each tick's smoothed, as the robot executes it."""
    return np.array([
        low_pass.filter(begin_s + DT_S * np.arange(float(ahead)), step_at_zero)[0, 0]  # type: ignore[index]
        for begin_s in np.arange(-0.2, until_s, DT_S)
    ])  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 20.0))
def test_a_step_is_followed_without_overshoot(cutoff_hz: float) -> None:
    motion = follow(LowPassFilter(cutoff_hz), 4.0)
    assert motion[0] == 0 and (motion <= 1 + 1e-9).all() and (np.diff(motion) >= -1e-9).all()
    assert motion[-1] > 0.9


def test_overlapping_ticks_continue_one_trajectory() -> None:
    """The smoothed of one long call and that of many short ones are the same."""
    whole = LowPassFilter(2.0).filter(-0.2 + DT_S * np.arange(60.0), step_at_zero)
    assert whole is not None
    np.testing.assert_allclose(follow(LowPassFilter(2.0), 0.98), whole[:59, 0], atol=1e-9)


def test_the_lag_is_the_one_reported() -> None:
    low_pass = LowPassFilter(3.0)
    times_s = DT_S * np.arange(200.0)
    smoothed = low_pass.filter(times_s, lambda t: t[:, None] * 0.5)
    assert smoothed is not None
    behind_s = times_s[-1] - smoothed[-1, 0] / 0.5
    # a target is held for a step, which adds half of one
    assert behind_s == pytest.approx(low_pass.lag_s, abs=DT_S)


def test_the_cutoff_is_3_db() -> None:
    low_pass = LowPassFilter(2.0)
    times_s = 0.001 * np.arange(8000.0)
    smoothed = low_pass.filter(times_s, lambda t: np.sin(2 * math.pi * 2.0 * t)[:, None])
    assert smoothed is not None
    assert np.abs(smoothed[4000:]).max() == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_grippers_pass_and_a_start_begins_where_the_robot_is() -> None:
    low_pass = LowPassFilter(2.0, exempt=np.array([False, True]))
    low_pass.start(np.array([0.3, 0.0]))
    smoothed = low_pass.filter(DT_S * np.arange(5.0), lambda t: np.ones((len(t), 2)))
    assert smoothed is not None
    assert smoothed[0, 0] == 0.3 and (smoothed[:, 1] == 1).all()
    assert low_pass.filter(DT_S * np.arange(5.0), lambda t: None) is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_cutoff_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cutoff_hz"):
        LowPassFilter(bad)
