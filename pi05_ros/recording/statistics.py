"""Exact statistics of vectors and of 8-bit pictures, as LeRobot's stats.json holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi05_ros.recording.layout import QUANTILES

Statistics = dict[str, NDArray[Any]]
"""min, max, mean, std, count and the quantiles q01 … q99 of one feature."""


def vector_statistics(values: NDArray[Any]) -> Statistics:
    """Statistics of each entry over the data.

    LeRobot estimates the quantiles from histograms and, over several episodes, takes the outermost;
    these are NumPy's own, over all the data.

    Args:
        values: [n, ..., d], n ≥ 1; entries are what the last axis counts, as in LeRobot.

    Returns:
        Arrays [d]; `count` [1] is n.

    Raises:
        ValueError: there is no data.
    """
    if values.size == 0:
        raise ValueError("there are no statistics of no data")
    if values.ndim == 1:
        values = values[:, None]
    columns = values.reshape(-1, values.shape[-1])
    # column by column: float64 of all columns at once would take eight times the memory of float32
    rows = [_column_statistics(columns[:, k]) for k in range(columns.shape[1])]
    statistics: Statistics = {
        name: np.array([row[name] for row in rows]) for name in ("min", "max", "mean", "std")
    }
    statistics["count"] = np.array([len(values)])
    for name in QUANTILES:
        statistics[name] = np.array([row[name] for row in rows])
    return statistics


def _column_statistics(column: NDArray[Any]) -> dict[str, float]:
    column = np.ascontiguousarray(column, dtype=np.float64)
    quantiles = np.quantile(column, list(QUANTILES.values()))
    return {
        "min": float(column.min()),
        "max": float(column.max()),
        "mean": float(column.mean()),
        "std": float(column.std()),
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    }


class PictureHistogram:
    """Counts the values of RGB pictures; statistics of all pixels of all pictures counted."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._pictures = 0

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Count one picture [height, width, 3]."""
        for channel in range(3):
            self._counts[channel] += np.bincount(picture[..., channel].ravel(), minlength=256)
        self._pictures += 1

    def merge(self, other: PictureHistogram) -> None:
        """Count what `other` has counted, too."""
        self._counts += other._counts
        self._pictures += other._pictures

    def statistics(self) -> Statistics:
        """Per channel [3, 1, 1], values from 0 to 1; `count` [1] is the number of pictures.

        Raises:
            ValueError: no picture was added.
        """
        if self._pictures == 0:
            raise ValueError("there are no statistics of no pictures")
        values = np.arange(256) / 255.0
        n = int(self._counts[0].sum())
        mean = self._counts @ values / n
        variance = self._counts @ values**2 / n - mean**2
        seen = self._counts > 0
        found = {
            "min": values[seen.argmax(axis=1)],
            "max": values[255 - seen[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(variance, 0.0)),
        }
        below = self._counts.cumsum(axis=1)
        for name, q in QUANTILES.items():
            rank = q * (n - 1)
            low, high = (
                np.array([np.searchsorted(row, k, side="right") for row in below])
                for k in (np.floor(rank), np.ceil(rank))
            )
            found[name] = values[low] + (values[high] - values[low]) * (rank - np.floor(rank))
        statistics: Statistics = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        statistics["count"] = np.array([self._pictures])
        return statistics
