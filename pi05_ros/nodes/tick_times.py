"""How punctual the control timer is."""

from __future__ import annotations

import time
from collections import deque

from pi05_ros.control.latency import LatencySummary, LatencyTracker

RATE_TICKS = 251
"""Ticks that the measured control rate is taken over."""


class TickTimes:
    """Rate and jitter of a timer, by time.monotonic."""

    def __init__(self) -> None:
        self.ticks = 0
        self._jitter = LatencyTracker()
        self._times_s: deque[float] = deque(maxlen=RATE_TICKS)

    def mark(self, period_s: float) -> None:
        """A tick; the one before should have been `period_s` ago."""
        now_s = time.monotonic()
        if self._times_s:
            self._jitter.add(abs(now_s - self._times_s[-1] - period_s))
        self._times_s.append(now_s)
        self.ticks += 1

    def pause(self) -> None:
        """The timer stood until now."""
        self._times_s.clear()

    @property
    def rate_hz(self) -> float:
        """Over the last ticks; 0 before the second one."""
        times_s = self._times_s
        span_s = times_s[-1] - times_s[0] if len(times_s) > 1 else 0.0
        return (len(times_s) - 1) / span_s if span_s > 0 else 0.0

    def jitter(self) -> LatencySummary | None:
        """|interval - period|; None before the second tick."""
        return self._jitter.summary()
