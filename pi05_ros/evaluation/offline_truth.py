"""What the robot did: recorded commands where there are any, else measured positions.

Only the last moments are kept; whoever asks must ask in time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from pi05_ros.evaluation.offline_events import Command
from pi05_ros.types import FloatArray

BoolArray = NDArray[np.bool_]

MAX_GAP_S = 0.3
"""Between two samples further apart nothing is known."""
_SPACING_S = 0.1
"""Points of one trajectory are connected however far apart, by samples this far apart."""
_TOLERANCE_S = 1e-6


class Timeline:
    """Values over time, linear in between."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._values: list[FloatArray] = []

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def end_s(self) -> float:
        return self.times_s[-1] if self.times_s else -np.inf

    def append(self, time_s: float, values: FloatArray) -> None:
        """A sample; one that is not later than the newest is dropped."""
        if time_s > self.end_s:
            self.times_s.append(time_s)
            self._values.append(values)

    def replace_from(self, start_s: float, times_s: FloatArray, values: FloatArray) -> None:
        """A trajectory that ends the one before at `start_s`, where that one is to be left."""
        joint, known = self.at(np.array([start_s]))
        keep = bisect_left(self.times_s, start_s - _TOLERANCE_S)
        del self.times_s[keep:], self._values[keep:]
        if known[0] and times_s[0] > start_s + _TOLERANCE_S:
            times_s = np.concatenate(([start_s], times_s))
            values = np.concatenate((joint, values))
        self._extend(float(times_s[0]), values[0])
        for k in range(1, len(times_s)):
            before_s, after_s = float(times_s[k - 1]), float(times_s[k])
            pieces = int(np.ceil((after_s - before_s) / _SPACING_S))
            for share in np.arange(1, pieces + 1) / pieces:
                mixed = (1 - share) * values[k - 1] + share * values[k]
                self._extend(before_s + share * (after_s - before_s), mixed)

    def _extend(self, time_s: float, values: FloatArray) -> None:
        self.times_s.append(time_s)
        self._values.append(values)

    def at(self, times_s: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Times [n] → values [n, dims], and [n] whether anything is known of them."""
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

    def trim(self, before_s: float) -> None:
        """Forget all but one sample before a time."""
        count = max(0, bisect_left(self.times_s, before_s) - 1)
        del self.times_s[:count], self._values[:count]


class Truth:
    """The course of all joints.

    A joint follows its controller's commands if some were recorded before the first question, and
    its measured positions otherwise.
    """

    def __init__(self, n_joints: int) -> None:
        self.measured = Timeline()
        self._n_joints = n_joints
        self._commanded: dict[tuple[int, ...], Timeline] = {}
        self._owner: dict[tuple[int, ...], Timeline] | None = None

    @property
    def commanded_columns(self) -> list[int]:
        """Joints that are compared with commands."""
        return sorted(column for columns in self._owner or self._commanded for column in columns)

    def put_joints(self, stamp_s: float, positions: FloatArray) -> None:
        self.measured.append(stamp_s, positions)

    def put_command(self, command: Command) -> None:
        line = self._commanded.setdefault(command.columns, Timeline())
        if len(command.times_s) == 1:
            line.append(float(command.times_s[0]), command.positions[0])
        else:
            line.replace_from(command.start_s, command.times_s, command.positions)

    def at(self, times_s: FloatArray, until_s: float) -> tuple[FloatArray, BoolArray]:
        """Increasing times [n] → positions [n, n_joints], and [n] whether they are known.

        Args:
            times_s: not earlier than what `trim` has left.
            until_s: what is planned for later has not happened.
        """
        if self._owner is None:
            self._owner = dict(self._commanded)
        positions, known = self.measured.at(times_s)
        if positions.shape[1] != self._n_joints:
            positions, known = np.zeros((len(times_s), self._n_joints)), known & False
        covered: set[int] = set()
        all_known = np.ones(len(times_s), dtype=bool)
        for columns, line in self._owner.items():
            values, mine = line.at(times_s)
            positions[:, list(columns)] = values
            all_known &= mine
            covered.update(columns)
        if len(covered) < self._n_joints:
            all_known &= known
        return positions, all_known & (times_s <= until_s + _TOLERANCE_S)

    def velocity(self, stamp_s: float, span_s: float = 0.1) -> FloatArray | None:
        """[n_joints] mean measured speed over the time before a stamp; None if it is not known."""
        positions, known = self.measured.at(np.array([stamp_s - span_s, stamp_s]))
        if not known.all():
            return None
        return np.asarray((positions[1] - positions[0]) / span_s)

    def trim(self, before_s: float) -> None:
        for line in (self.measured, *self._commanded.values()):
            line.trim(before_s)
