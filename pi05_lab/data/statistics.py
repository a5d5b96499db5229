"""Statistics of vectors and of 8-bit images, as LeRobot's stats.json holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import ImageArray

Statistics = dict[str, NDArray[Any]]
"""min, max, mean, std, count and the quantiles q01 … q99 of one feature."""

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_BASIC = ("min", "max", "mean", "std")


def vector_statistics(values: NDArray[Any]) -> Statistics:
    """Statistics [d] of each entry of `values` [n, ..., d], n ≥ 1; `count` [1] is n.

    The last axis counts the entries, as in LeRobot. LeRobot estimates the quantiles from histograms
    and, over several episodes, takes the outermost; these are exact, over all the data.
    """
    if values.size == 0:
        raise ValueError("there are no statistics of no data")
    rows: list[list[float]] = []
    for column in values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1).T:
        # Column by column: float64 of all columns would take a multiple of the data's memory.
        numbers = np.ascontiguousarray(column, dtype=np.float64)
        quantiles = np.quantile(numbers, list(QUANTILES.values()))
        rows.append(
            [numbers.min(), numbers.max(), numbers.mean(), numbers.std(), *quantiles.tolist()]
        )
    named: Statistics = dict(zip((*_BASIC, *QUANTILES), np.array(rows).T, strict=True))
    named["count"] = np.array([len(values)])
    return {name: named[name] for name in (*_BASIC, "count", *QUANTILES)}


class ImageHistogram:
    """Counts the values of RGB images, for the statistics of all pixels."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._images = 0

    def add(self, image: ImageArray) -> None:
        """Count one image [height, width, 3]."""
        for channel in range(3):
            self._counts[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
        self._images += 1

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for `from_json`."""
        return {"counts": self._counts.tolist(), "images": self._images}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ImageHistogram:
        """The histogram that `to_json` described."""
        histogram = cls()
        histogram._counts = np.array(document["counts"], dtype=np.int64)
        histogram._images = int(document["images"])
        return histogram

    def merge(self, other: ImageHistogram) -> None:
        """Add the counts of another histogram."""
        self._counts += other._counts
        self._images += other._images

    def statistics(self) -> Statistics:
        """Per channel [3, 1, 1], values from 0 to 1; `count` [1] is the number of images."""
        if self._images == 0:
            raise ValueError("there are no statistics of no images")
        values = np.arange(256) / 255.0
        n = int(self._counts[0].sum())
        mean = self._counts @ values / n
        variance = self._counts @ values**2 / n - mean**2
        seen = self._counts > 0
        low = values[seen.argmax(axis=1)]
        high = values[255 - seen[:, ::-1].argmax(axis=1)]
        rows = [low, high, mean, np.sqrt(np.maximum(variance, 0.0))]
        below = self._counts.cumsum(axis=1)
        for quantile in QUANTILES.values():
            rank = quantile * (n - 1)
            below_rank, above_rank = (
                values[[np.searchsorted(row, k, side="right") for row in below]]
                for k in (np.floor(rank), np.ceil(rank))
            )
            rows.append(below_rank + (above_rank - below_rank) * (rank - np.floor(rank)))
        columns = [row.reshape(3, 1, 1) for row in rows]
        named: Statistics = dict(zip((*_BASIC, *QUANTILES), columns, strict=True))
        return named | {"count": np.array([self._images])}
