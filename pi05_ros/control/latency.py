"""How long an observation takes to become a usable chunk."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles over the tracker's window."""

    count: int
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float


class LatencyTracker:
    """Measured latencies over a bounded window.

    Warm-up runs must not be added: a cold start is many times slower and would inflate the
    estimate until it leaves the window.
    """

    def __init__(self, window: int = 1000, recent: int = 10) -> None:
        """`window`: samples behind the percentiles; `recent`: samples behind the estimate."""
        if not 1 <= recent <= window:
            raise ValueError(f"need 1 <= recent <= window, got recent {recent}, window {window}")
        self._samples_s: deque[float] = deque(maxlen=window)
        self._recent_s: deque[float] = deque(maxlen=recent)

    def add(self, seconds: float) -> None:
        """Take one measurement; a negative or non-finite one raises ValueError."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a latency must be finite and >= 0 s, got {seconds}")
        self._samples_s.append(seconds)
        self._recent_s.append(seconds)

    @property
    def estimate_s(self) -> float | None:
        """What the next inference may take: the largest recent latency; None before the first."""
        return max(self._recent_s, default=None)

    def summary(self) -> LatencySummary | None:
        """None before the first measurement."""
        if not self._samples_s:
            return None
        samples = np.fromiter(self._samples_s, dtype=np.float64)
        p50, p95, p99 = np.percentile(samples, (50, 95, 99))
        return LatencySummary(
            len(samples), float(p50), float(p95), float(p99), float(samples.max())
        )

    def clear(self) -> None:
        self._samples_s.clear()
        self._recent_s.clear()
