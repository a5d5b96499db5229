"""Faults pinned: an estimate that keeps an old spike for ever, or that forgets a recent one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pi05_ros.control import LatencyTracker


def test_nothing_is_reported_before_the_first_measurement() -> None:
    tracker = LatencyTracker()
    assert tracker.summary() is None
    assert tracker.estimate_s is None


def test_estimate_is_the_largest_of_the_last_ten() -> None:
    tracker = LatencyTracker()
    tracker.add(0.9)
    for _ in range(9):
        tracker.add(0.1)
    assert tracker.estimate_s == 0.9
    tracker.add(0.2)
    assert tracker.estimate_s == 0.2


def test_summary_covers_the_window_alone() -> None:
    tracker = LatencyTracker(window=100)
    for value in [50.0] * 7 + list(range(1, 101)):
        tracker.add(value)
    summary = tracker.summary()
    assert summary is not None
    assert summary.count == 100
    assert summary.max_s == 100.0
    expected = np.percentile(np.arange(1, 101), (50, 95, 99))
    assert (summary.p50_s, summary.p95_s, summary.p99_s) == pytest.approx(expected)


def test_clear_forgets() -> None:
    tracker = LatencyTracker()
    tracker.add(0.3)
    tracker.clear()
    assert tracker.summary() is None
    assert tracker.estimate_s is None


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf])
def test_impossible_latency_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="latency"):
        LatencyTracker().add(seconds)


@pytest.mark.parametrize(("window", "recent"), [(5, 6), (5, 0)])
def test_bad_windows_are_refused(window: int, recent: int) -> None:
    with pytest.raises(ValueError, match="recent"):
        LatencyTracker(window, recent)
