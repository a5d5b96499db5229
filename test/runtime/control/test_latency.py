"""Faults pinned: an estimate that keeps an old spike for ever, or that forgets a recent one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pi05_ros.control.latency import WINDOW, LatencySummary, LatencyTracker


def test_nothing_is_reported_before_the_first_measurement() -> None:
    tracker = LatencyTracker()
    assert tracker.summary() == LatencySummary()
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
    tracker = LatencyTracker()
    for value in [5e4] * 7 + list(range(1, WINDOW + 1)):
        tracker.add(value)
    summary = tracker.summary()
    assert summary.count == WINDOW
    assert summary.max_s == WINDOW
    expected = np.percentile(np.arange(1, WINDOW + 1), (50, 95, 99))
    assert (summary.p50_s, summary.p95_s, summary.p99_s) == pytest.approx(expected)


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf])
def test_impossible_latency_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="latency"):
        LatencyTracker().add(seconds)
