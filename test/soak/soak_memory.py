"""Memory of a process over time, and its growth.

The policy node's resident size has levels: a reader's buffer keeps the memory of the largest number
of images that it held, up to 15 per camera or 41 MB, until the next configure, and a stall fills it
at once. The levels are bounded, but a median depends on how long each one lasted. Growth is
therefore measured between the 95th percentiles of the first and the last quarter. The slope is
Theil and Sen's, the median over all pairs, of the 95th percentiles of twelve intervals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEAK_PERCENT = 95
INTERVALS = 12
SMALLEST_SERIES = 4 * INTERVALS


@dataclass(frozen=True)
class Sample:
    """Memory, threads and files of a process at one time."""

    at_s: float
    """By time.monotonic."""
    rss_mb: float
    pss_mb: float
    """As RSS, with shared pages divided among their processes."""
    anonymous_mb: float
    """Heap, stacks and tensors: neither files nor shared memory."""
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        """Read /proc; raises OSError if the process has ended."""
        process = Path("/proc") / str(pid)
        kilobytes = {
            key.rstrip(":"): int(value)
            for key, value, *_ in map(
                str.split, (process / "smaps_rollup").read_text().splitlines()[1:]
            )
        }
        rss, pss, anonymous = (kilobytes[key] * 1.024e-3 for key in ("Rss", "Pss", "Anonymous"))
        threads, files = (len(list((process / part).iterdir())) for part in ("task", "fd"))
        return cls(time.monotonic(), rss, pss, anonymous, threads, files)


@dataclass(frozen=True)
class Growth:
    """Change of one figure over the measured time."""

    first: float
    """Of the first quarter."""
    last: float
    """Of the last quarter."""
    per_minute: float

    @property
    def share(self) -> float:
        return self.last / self.first - 1.0


def growth(times_s: Sequence[float], values: Sequence[float]) -> Growth:
    """Growth of a series in time order.

    Raises:
        ValueError: fewer than 48 values.
    """
    if len(values) < SMALLEST_SERIES:
        raise ValueError(f"growth needs {SMALLEST_SERIES} values, not {len(values)}")
    quarters = np.array_split(np.asarray(values, dtype=np.float64), 4)
    intervals = np.array_split(np.asarray(values, dtype=np.float64), INTERVALS)
    peaks = np.array([np.percentile(interval, PEAK_PERCENT) for interval in intervals])
    minutes = np.array([part.mean() / 60.0 for part in np.array_split(times_s, INTERVALS)])
    i, j = np.triu_indices(INTERVALS, 1)
    slope = float(np.median((peaks[j] - peaks[i]) / (minutes[j] - minutes[i])))
    first, last = (float(np.percentile(quarters[k], PEAK_PERCENT)) for k in (0, -1))
    return Growth(first, last, slope)
