"""Samples of a stream of any length in bounded memory, the same ones at every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi05_ros.types import FloatArray


class Decimated:
    """Every 2^k-th item of a stream: all of them up to `limit`, then ever fewer."""

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self._stride = 1
        self._items: list[Any] = []
        self.count = 0
        """Items that were added."""

    def add(self, item: Any) -> None:
        if self.count % self._stride == 0:
            self._items.append(item)
            if len(self._items) > self._limit:
                self._items = self._items[::2]
                self._stride *= 2
        self.count += 1

    @property
    def items(self) -> list[Any]:
        return list(self._items)


class Samples(Decimated):
    """A decimated stream of numbers whose largest one is never left out."""

    def __init__(self, limit: int = 2000) -> None:
        super().__init__(limit)
        self.largest = -math.inf

    def add(self, item: float) -> None:
        self.largest = max(self.largest, item)
        super().add(item)


def percentiles(values: Sequence[float], shares: Sequence[float] = (50, 95, 99)) -> list[float]:
    """The percentiles that are asked for; empty for no values."""
    if not len(values):
        return []
    return [float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), shares)]


def rounded(values: FloatArray | Sequence[float], digits: int = 5) -> Any:
    """Nested lists with few digits, None for what is not a number."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    return [round(float(v), digits) if np.isfinite(v) else None for v in array]
