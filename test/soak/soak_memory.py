"""A process's memory over time, and whether it grows.

The policy node's resident size has levels. A reader's buffer keeps the memory of the most pictures
that it ever held, 15 of each camera or 41 MB, until the next configure; a stall fills it at once.
That is bounded, and medians say by chance which level a stretch of time had. Growth is therefore
read from the 95th percentiles of the first and last quarter, and the slope is Theil and Sen's, the
median over all pairs, of the 95th percentiles of twelve stretches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEAK_PERCENT = 95
STRETCHES = 12
SMALLEST_SERIES = 4 * STRETCHES


@dataclass(frozen=True)
class Sample:
    """What a process holds at one moment."""

    at_s: float
    """By time.monotonic."""
    rss_mb: float
    pss_mb: float
    """As RSS, with what other processes map too in shares."""
    anonymous_mb: float
    """Of it the heap, stacks and tensors: neither files nor shared memory."""
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        """Read /proc; raises OSError when the process is gone."""
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
    """How one figure went over the settled time."""

    first: float
    """Of the first quarter."""
    last: float
    """Of the last quarter."""
    per_minute: float

    @property
    def share(self) -> float:
        return self.last / self.first - 1.0


def growth(times_s: Sequence[float], values: Sequence[float]) -> Growth:
    """Of a series in time order.

    Raises:
        ValueError: fewer than 48 values, which say nothing.
    """
    if len(values) < SMALLEST_SERIES:
        raise ValueError(f"growth needs {SMALLEST_SERIES} values, not {len(values)}")
    quarters = np.array_split(np.asarray(values, dtype=np.float64), 4)
    stretches = np.array_split(np.asarray(values, dtype=np.float64), STRETCHES)
    peaks = np.array([np.percentile(stretch, PEAK_PERCENT) for stretch in stretches])
    minutes = np.array([part.mean() / 60.0 for part in np.array_split(times_s, STRETCHES)])
    i, j = np.triu_indices(STRETCHES, 1)
    slope = float(np.median((peaks[j] - peaks[i]) / (minutes[j] - minutes[i])))
    first, last = (float(np.percentile(quarters[k], PEAK_PERCENT)) for k in (0, -1))
    return Growth(first, last, slope)
