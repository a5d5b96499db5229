"""Faults pinned: a filter that starts anew with every tick, overshoots, or reports another lag
than it has."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.control.speed import LowPassFilter
from pi05_ros.types import FloatArray

DT_S = 0.02


def step_at_zero(times_s: FloatArray) -> FloatArray:
    return np.where(times_s >= -DT_S / 2, 1.0, 0.0)[:, None]


def follow(follower: LowPassFilter, until_s: float, ahead: int = 12) -> FloatArray:
    """The first value of each tick's course, as the robot executes it."""
    return np.array([
        follower.course(begin_s + DT_S * np.arange(float(ahead)), step_at_zero)[0, 0]  # type: ignore[index]
        for begin_s in np.arange(-0.2, until_s, DT_S)
    ])  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 20.0))
def test_a_step_is_followed_without_overshoot(cutoff_hz: float) -> None:
    motion = follow(LowPassFilter(cutoff_hz), 4.0)
    assert motion[0] == 0 and (motion <= 1 + 1e-9).all() and (np.diff(motion) >= -1e-9).all()
    assert motion[-1] > 0.9


def test_ticks_that_overlap_continue_one_course() -> None:
    """The course of one long call and that of many short ones are the same."""
    whole = LowPassFilter(2.0).course(-0.2 + DT_S * np.arange(60.0), step_at_zero)
    assert whole is not None
    np.testing.assert_allclose(follow(LowPassFilter(2.0), 0.98), whole[:59, 0], atol=1e-9)


def test_the_lag_is_the_one_reported() -> None:
    follower = LowPassFilter(3.0)
    times_s = DT_S * np.arange(200.0)
    course = follower.course(times_s, lambda t: t[:, None] * 0.5)
    assert course is not None
    behind_s = times_s[-1] - course[-1, 0] / 0.5
    # a target is held for a step, which adds half of one
    assert behind_s == pytest.approx(follower.lag_s, abs=DT_S)


def test_the_cutoff_is_3_db() -> None:
    follower = LowPassFilter(2.0)
    times_s = 0.001 * np.arange(8000.0)
    course = follower.course(times_s, lambda t: np.sin(2 * math.pi * 2.0 * t)[:, None])
    assert course is not None
    assert np.abs(course[4000:]).max() == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_grippers_pass_and_a_start_begins_where_the_robot_is() -> None:
    follower = LowPassFilter(2.0, exempt=np.array([False, True]))
    follower.start(np.array([0.3, 0.0]))
    course = follower.course(DT_S * np.arange(5.0), lambda t: np.ones((len(t), 2)))
    assert course is not None
    assert course[0, 0] == 0.3 and (course[:, 1] == 1).all()
    assert follower.course(DT_S * np.arange(5.0), lambda t: None) is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_cutoff_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cutoff_hz"):
        LowPassFilter(bad)
