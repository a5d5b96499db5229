"""The reference trajectory: recorded commands where there are any, else measured positions.

A sliding window: query a time before `trim` removes it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pi05_lab.data.recording import Command
from pi05_ros.types import FloatArray

BoolArray = NDArray[np.bool_]

MAX_GAP_S = 0.3
"""Between samples that are further apart the trajectory is unknown."""
DENSE_STEPS = 1.5
"""Commands at most this many control ticks apart come at the control rate."""
_SPACING_S = 0.1
"""Distance of the samples that connect the points of one commanded trajectory."""
_TOLERANCE_S = 1e-6


class Timeline:
    """Sampled values over time with linear interpolation."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._values: list[FloatArray] = []

    def append(self, time_s: float, values: FloatArray) -> None:
        """Add a sample; one that is not later than the newest is dropped."""
        if not self.times_s or time_s > self.times_s[-1]:
            self.times_s.append(time_s)
            self._values.append(values)

    def replace_from(self, start_s: float, times_s: FloatArray, values: FloatArray) -> None:
        """Continue from the value at `start_s` with another trajectory."""
        joint, known = self.at(np.array([start_s]))
        keep = bisect_left(self.times_s, start_s - _TOLERANCE_S)
        del self.times_s[keep:], self._values[keep:]
        if known[0] and times_s[0] > start_s + _TOLERANCE_S:
            times_s = np.concatenate(([start_s], times_s))
            values = np.concatenate((joint, values))
        self.append(float(times_s[0]), values[0])
        for k in range(1, len(times_s)):
            before_s, after_s = float(times_s[k - 1]), float(times_s[k])
            pieces = int(np.ceil((after_s - before_s) / _SPACING_S))
            for share in np.arange(1, pieces + 1) / pieces:
                mixed = (1 - share) * values[k - 1] + share * values[k]
                self.append(before_s + share * (after_s - before_s), mixed)

    def at(self, times_s: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Increasing times [n] → values [n, dims], and [n] whether they are known."""
        if not self.times_s:
            return np.zeros((len(times_s), 0)), np.zeros(len(times_s), dtype=bool)
        low = max(0, bisect_left(self.times_s, float(times_s[0])) - 1)
        high = bisect_right(self.times_s, float(times_s[-1]) + _TOLERANCE_S) + 1
        known_s = np.array(self.times_s[low:high])
        values = np.array(self._values[low:high])
        after = np.clip(np.searchsorted(known_s, times_s - _TOLERANCE_S), 0, len(known_s) - 1)
        before = np.maximum(after - 1, 0)
        exact = np.abs(known_s[after] - times_s) <= _TOLERANCE_S
        gap_s = known_s[after] - known_s[before]
        inside = (known_s[before] <= times_s) & (times_s <= known_s[after] + _TOLERANCE_S)
        share = np.where(
            gap_s > 0, (times_s - known_s[before]) / np.where(gap_s > 0, gap_s, 1), 1.0
        )
        share = np.where(exact, 1.0, np.clip(share, 0.0, 1.0))[:, None]
        mixed = (1 - share) * values[before] + share * values[after]
        return mixed, exact | (inside & (gap_s <= MAX_GAP_S + _TOLERANCE_S))

    def spacing_s(self, time_s: float) -> float:
        """Distance of the two samples around a time; infinite outside of all samples."""
        after = bisect_left(self.times_s, time_s - _TOLERANCE_S)
        if after >= len(self.times_s):
            return np.inf
        if after == 0:
            exact = self.times_s[0] <= time_s + _TOLERANCE_S
            return self.times_s[1] - self.times_s[0] if exact and self.times_s[1:] else np.inf
        return self.times_s[after] - self.times_s[after - 1]

    def trim(self, before_s: float) -> None:
        """Remove all but one sample before a time."""
        count = max(0, bisect_left(self.times_s, before_s) - 1)
        del self.times_s[:count], self._values[:count]


class ReferenceTrajectory:
    """The reference trajectory of all joints.

    Joints of a controller whose commands were recorded follow these commands alone: before the
    first one they are unknown. Other joints follow their measured positions. `commanded` has the
    columns of each controller whose commands were recorded.
    """

    def __init__(self, n_joints: int, commanded: Sequence[tuple[int, ...]] = ()) -> None:
        self.measured = Timeline()
        self._n_joints = n_joints
        self.awaited = list(commanded)
        """Columns of the controllers without a usable command so far."""
        self.begun_s: dict[tuple[int, ...], float] = {}
        """Columns → start of their first command."""
        self._commanded: dict[tuple[int, ...], Timeline] = {}

    @property
    def commanded_columns(self) -> list[int]:
        """Joints whose reference is their commands."""
        return sorted({column for columns in self._commanded for column in columns})

    def put_joints(self, stamp_s: float, positions: FloatArray) -> None:
        self.measured.append(stamp_s, positions)

    def put_command(self, command: Command) -> None:
        line = self._commanded.setdefault(command.columns, Timeline())
        self.begun_s.setdefault(command.columns, float(command.times_s[0]))
        self.awaited = [own for own in self.awaited if not set(own) & set(command.columns)]
        if len(command.times_s) == 1:
            line.append(float(command.times_s[0]), command.positions[0])
        else:
            line.replace_from(command.start_s, command.times_s, command.positions)

    def at(self, times_s: FloatArray, until_s: float) -> tuple[FloatArray, BoolArray]:
        """Increasing times [n] → positions [n, n_joints], and [n] whether they are known.

        Times after `until_s` are unknown: their commands have not been executed.
        """
        positions, known = self.measured.at(times_s)
        if positions.shape[1] != self._n_joints:
            positions, known = np.zeros((len(times_s), self._n_joints)), known & False
        covered: set[int] = set()
        all_known = np.full(len(times_s), not self.awaited)
        for columns, line in self._commanded.items():
            values, mine = line.at(times_s)
            positions[:, list(columns)] = values
            all_known &= mine
            covered.update(columns)
        if len(covered) < self._n_joints:
            all_known &= known
        return positions, all_known & (times_s <= until_s + _TOLERANCE_S)

    def is_dense(self, time_s: float, columns: Iterable[int], dt_s: float) -> bool:
        """Whether commands for all these joints come at steps of about `dt_s` around a time.

        Only then do differences of the interpolated trajectory describe the motion: measured
        positions carry the encoder's steps, and sparse set-points the corners between them.
        """
        dense = {
            column
            for own, line in self._commanded.items()
            if line.spacing_s(time_s) <= DENSE_STEPS * dt_s
            for column in own
        }
        return dense.issuperset(columns)

    def velocity(self, stamp_s: float, span_s: float = 0.1) -> FloatArray | None:
        """Mean measured velocity [n_joints] over the time before a stamp; None if it is unknown."""
        positions, known = self.measured.at(np.array([stamp_s - span_s, stamp_s]))
        if not known.all():
            return None
        return np.asarray((positions[1] - positions[0]) / span_s)

    def trim(self, before_s: float) -> None:
        for line in (self.measured, *self._commanded.values()):
            line.trim(before_s)
