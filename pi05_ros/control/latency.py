"""Time from an observation to its usable chunk, and other latencies."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np

WINDOW = 1000
"""Measurements behind the percentiles."""
RECENT = 10
"""Measurements behind the estimate."""


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles over the last `WINDOW` measurements, 0 without any."""

    count: int = 0
    p50_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0


class LatencyTracker:
    """Measured latencies. Warm-up runs must not be added: a cold start is many times slower."""

    def __init__(self) -> None:
        self._samples_s: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """Add a measurement; a negative or non-finite one raises ValueError."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a latency must be finite and >= 0 s, got {seconds}")
        self._samples_s.append(seconds)

    @property
    def estimate_s(self) -> float | None:
        """The largest of the last `RECENT` latencies; None before the first."""
        return max(islice(reversed(self._samples_s), RECENT), default=None)

    @property
    def fastest_s(self) -> float | None:
        """The smallest of the last `RECENT` latencies; None before the first."""
        return min(islice(reversed(self._samples_s), RECENT), default=None)

    def summary(self) -> LatencySummary:
        if not self._samples_s:
            return LatencySummary()
        samples = np.fromiter(self._samples_s, dtype=np.float64)
        p50, p95, p99 = np.percentile(samples, (50, 95, 99))
        return LatencySummary(
            len(samples), float(p50), float(p95), float(p99), float(samples.max())
        )
