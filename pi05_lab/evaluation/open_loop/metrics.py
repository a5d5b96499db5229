"""Sums from which the figures of an evaluation are made. They add up over episodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi05_lab.evaluation import statistics as motion_measures
from pi05_lab.evaluation.open_loop.series import Decimated, rounded
from pi05_ros.types import FloatArray, JointGroup

BoolArray = NDArray[np.bool_]

WINDOW_S = 5.0
"""Smoothness is measured over so much at a time, so that recordings of any length compare."""
MIN_WINDOW_S = 1.0
GRIPPER_TOLERANCE_S = 0.25
"""Between a recorded and a predicted opening or closing that are the same one."""


class ErrorSums:
    """Errors of chunks, by joint and by step.

    Args:
        horizon: steps of a chunk.
        n_joints: of the robot.
    """

    def __init__(self, horizon: int, n_joints: int) -> None:
        self.chunks = 0
        self.absolute = np.zeros((horizon, n_joints))
        self.squared = np.zeros((horizon, n_joints))
        self.steps = np.zeros(horizon, dtype=np.int64)

    def add(self, predicted: FloatArray, truth: FloatArray, known: BoolArray) -> FloatArray:
        """Take a chunk [horizon, n_joints]; returns its mean absolute error by joint."""
        error = np.where(known[:, None], predicted - truth, 0.0)
        self.chunks += 1
        self.absolute += np.abs(error)
        self.squared += error**2
        self.steps += known
        return np.asarray(np.abs(error).sum(axis=0) / max(1, int(known.sum())))

    def to_dict(self, arm: BoolArray) -> dict[str, Any]:
        """Sums by joint over all steps, and by step the mean over the joints of `arm`."""
        by_step = self.absolute[:, arm].mean(axis=1) if arm.any() else self.absolute.mean(axis=1)
        return {
            "chunks": self.chunks,
            "by_joint": rounded(self.absolute.sum(axis=0), 9),
            "squared_by_joint": rounded(self.squared.sum(axis=0), 9),
            "by_step": rounded(by_step, 9),
            "steps": self.steps.tolist(),
        }


@dataclass
class _Change:
    """A recorded opening or closing of one gripper."""

    time_s: float
    column: int
    opens: bool
    chunks: int = 0
    """In whose time it is."""
    found: int = 0


class GripperTally:
    """Whether chunks open or close a gripper as the recording does, and when.

    A gripper changes when it crosses the middle of its limits after the observation. A chunk finds
    the change if its first one has the same direction and is at most `GRIPPER_TOLERANCE_S` away;
    one farther away is missed and another one invented. Overlapping chunks have the same change in
    their time, so changes are counted beside: one is found if at least half of its chunks find it.
    Nothing is judged that lies within the tolerance of what is not known.

    Args:
        joints: of the robot.
    """

    def __init__(self, joints: JointGroup) -> None:
        self.found = self.missed = self.invented = 0
        self.offsets_s = Decimated(1000)
        self.changes: list[_Change] = []
        self._columns = np.flatnonzero(joints.gripper)
        self._middle = (joints.lower + joints.upper) / 2

    def add(
        self,
        predicted: FloatArray,
        truth: FloatArray,
        known: BoolArray,
        now: FloatArray,
        stamp_s: float,
        dt_s: float,
    ) -> None:
        """Take a chunk [horizon, n_joints] from an observation at `now` [n_joints]."""
        steps = len(known) if known.all() else int(np.argmin(known))
        tolerance = GRIPPER_TOLERANCE_S / dt_s + 1e-9
        # a change nearer than this to what is not known may have its counterpart there
        judged = steps - 1 - tolerance
        for column in self._columns:
            middle = self._middle[column]
            side = bool(now[column] > middle)
            mine = _first((predicted[:, column] > middle) != side)
            real = _first((truth[:steps, column] > middle) != side)
            if real is None:
                self.invented += mine is not None and mine <= judged
                continue
            close = mine is not None and abs(mine - real) <= tolerance
            if not close and real > len(predicted) - 1 - tolerance:
                continue
            change = self._change(stamp_s + real * dt_s, int(column), not side, dt_s)
            change.chunks += 1
            if mine is not None and close:
                self.found += 1
                change.found += 1
                self.offsets_s.add(float((mine - real) * dt_s))
                continue
            self.missed += 1
            self.invented += mine is not None and mine <= judged

    def _change(self, time_s: float, column: int, opens: bool, dt_s: float) -> _Change:
        """The change at a time.

        Chunks from other stamps date it up to a step differently, or, where the measured gripper
        follows late, at their first step.
        """
        for change in reversed(self.changes):
            same = change.column == column and change.opens == opens
            if same and abs(change.time_s - time_s) <= GRIPPER_TOLERANCE_S + dt_s:
                return change
        self.changes.append(_Change(time_s, column, opens))
        return self.changes[-1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "found": self.found,
            "missed": self.missed,
            "invented": self.invented,
            "changes": len(self.changes),
            "changes_found": sum(2 * change.found >= change.chunks for change in self.changes),
            "offsets_s": rounded(self.offsets_s.items, 6),
        }


def _first(changed: BoolArray) -> int | None:
    return int(np.argmax(changed)) if changed.any() else None


class MotionWindows:
    """Smoothness of a motion, window by window.

    Args:
        dt_s: between two samples.
        columns: of the joints that count.
    """

    def __init__(self, dt_s: float, columns: NDArray[np.int64]) -> None:
        self._dt_s = dt_s
        self._columns = columns
        self._samples: list[FloatArray] = []
        self._last_s = -math.inf
        self.windows: list[tuple[float, float, float, float]] = []
        """Duration in s, RMS jerk, LDLJ and SPARC of each; nan where nothing moves."""

    def add(self, time_s: float, positions: FloatArray) -> None:
        """The next sample [n_joints]; one that is not the next tick's begins another window."""
        if time_s - self._last_s > 1.5 * self._dt_s:
            self.end()
        self._last_s = time_s
        self._samples.append(positions[self._columns])
        if len(self._samples) * self._dt_s >= WINDOW_S:
            self.end()

    def end(self) -> None:
        """The motion is interrupted."""
        samples, self._samples = self._samples, []
        duration_s = len(samples) * self._dt_s
        if duration_s < MIN_WINDOW_S or not len(self._columns):
            return
        motion = np.array(samples)
        self.windows.append(
            (
                duration_s,
                motion_measures.rms_jerk(motion, self._dt_s),
                motion_measures.log_dimensionless_jerk(motion, self._dt_s),
                motion_measures.spectral_arc_length(motion, self._dt_s),
            )
        )

    def to_list(self) -> list[list[float | None]]:
        return [rounded(window, 6) for window in self.windows]


def gripper_f1(found: int, missed: int, invented: int) -> float:
    """2·TP / (2·TP + FN + FP); nan without any change."""
    total = 2 * found + missed + invented
    return 2 * found / total if total else math.nan
