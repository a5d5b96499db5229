"""Faults pinned: a jump in position or velocity when the speed changes, a plan that creeps while it
is held, steps of an old observation read at another speed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.control.speed import SpeedScaler

NOW_S = 1.7e9


def test_at_full_speed_the_plans_time_is_the_clocks() -> None:
    clock = SpeedScaler()
    for time_s in (0.0, NOW_S + 0.1234567, -3.0):
        assert clock.plan_s(time_s) == time_s


def test_zero_stands_still_after_the_ramp() -> None:
    clock = SpeedScaler(ramp_s=0.5)
    clock.set_scale(0.0, NOW_S)
    assert clock.rate(NOW_S) == 1.0
    assert clock.rate(NOW_S + 0.25) == pytest.approx(0.5, abs=1e-6)
    assert clock.rate(NOW_S + 0.5) == 0.0
    stands = clock.plan_times_s(NOW_S + np.linspace(0.5, 100.0, 50))
    assert np.ptp(stands) == 0.0
    assert stands[0] == pytest.approx(NOW_S + 0.25, abs=1e-6)


def test_times_before_a_change_keep_their_place() -> None:
    """An observation that was made at full speed stays where it was in the plan."""
    clock = SpeedScaler()
    clock.set_scale(0.25, NOW_S)
    clock.set_scale(1.0, NOW_S + 5.0)
    assert clock.plan_s(NOW_S - 0.3) == pytest.approx(NOW_S - 0.3, abs=1e-6)
    before, after = clock.plan_times_s([NOW_S + 4.0, NOW_S + 4.4])
    assert after - before == pytest.approx(0.1, abs=1e-6)


def test_a_reset_begins_at_the_scale() -> None:
    clock = SpeedScaler(0.5)
    clock.set_scale(0.2, NOW_S)
    clock.reset()
    assert clock.rate(NOW_S) == 0.2
    assert clock.plan_s(NOW_S + 1.0) - clock.plan_s(NOW_S) == pytest.approx(0.2, abs=1e-6)


@given(
    changes=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 2.0)), min_size=1, max_size=40),
    ramp_s=st.floats(0.05, 2.0),
)
@settings(max_examples=50, deadline=None)
def test_any_changes_of_speed_are_continuous(
    changes: list[tuple[float, float]], ramp_s: float
) -> None:
    """The plan never goes back, never faster than the clock, and its rate has no jump."""
    clock = SpeedScaler(ramp_s=ramp_s)
    now_s = 1000.0
    for scale, wait_s in changes:
        before_s, rate = clock.plan_s(now_s), clock.rate(now_s)
        clock.set_scale(scale, now_s)
        assert clock.plan_s(now_s) == pytest.approx(before_s, abs=1e-9)
        assert clock.rate(now_s) == pytest.approx(rate, abs=1e-9)
        times_s = now_s + np.linspace(0.0, max(wait_s, 0.01), 20)
        steps_s = np.diff(clock.plan_times_s(times_s))
        assert (steps_s >= -1e-9).all()
        assert (steps_s <= np.diff(times_s) + 1e-9).all()
        rates = np.array([clock.rate(float(t)) for t in times_s])
        assert (np.abs(np.diff(rates)) <= np.diff(times_s) / ramp_s + 1e-9).all()
        now_s += wait_s


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan")])
def test_other_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="speed_scale"):
        SpeedScaler().set_scale(scale, NOW_S)
    with pytest.raises(ValueError, match="speed_scale"):
        SpeedScaler(scale)


@pytest.mark.parametrize("ramp_s", [-1.0, float("inf")])
def test_other_ramps_are_refused(ramp_s: float) -> None:
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
def test_a_clock_can_be_read_while_another_thread_resets_it() -> None:
    """Pins: an IndexError or a mutated deque in the thread that reads, which ended the node."""
    clock = SpeedScaler(0.5)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            clock.reset()
            clock.set_scale(0.5, NOW_S)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20_000):
            assert clock.rate(NOW_S) == 0.5
            assert clock.plan_s(NOW_S) == 0.5 * NOW_S
    finally:
        stop.set()
        writer.join()


def test_the_oldest_changes_of_speed_are_forgotten() -> None:
    clock = SpeedScaler(ramp_s=0.0)
    for k in range(1000):
        clock.set_scale(k % 2, float(k))
    assert clock.plan_s(1000.0) == pytest.approx(500.0)
    assert clock.plan_s(990.5) == pytest.approx(495.0)
