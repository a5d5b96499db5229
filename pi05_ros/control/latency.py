"""Time from an observation to its usable chunk, and other latencies."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

WINDOW = 1000
"""Measurements behind the percentiles."""
RECENT = 10
"""Measurements behind the estimate."""


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles over the last `WINDOW` measurements."""

    count: int
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float


class LatencyTracker:
    """Measured latencies. Warm-up runs must not be added: a cold start is many times slower."""

    def __init__(self) -> None:
        self._samples_s: deque[float] = deque(maxlen=WINDOW)
        self._recent_s: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """Add a measurement; a negative or non-finite one raises ValueError."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a latency must be finite and >= 0 s, got {seconds}")
        self._samples_s.append(seconds)
        self._recent_s.append(seconds)

    @property
    def estimate_s(self) -> float | None:
        """The largest of the last `RECENT` latencies; None before the first."""
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
