"""Sums from which the figures of an evaluation are made. They add up over episodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi05_ros.evaluation import motion_measures
from pi05_ros.evaluation.offline_series import Decimated, rounded
from pi05_ros.types import FloatArray, JointGroup

BoolArray = NDArray[np.bool_]

WINDOW_S = 5.0
"""Smoothness is measured over so much at a time, so that recordings of any length compare."""
MIN_WINDOW_S = 1.0


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


class GripperTally:
    """Whether a chunk opens or closes a gripper as the recording does, and when.

    A gripper changes when it crosses the middle of its limits between the observation and the
    chunk's end. A change is found if the chunk has one in the same direction.
    """

    def __init__(self, joints: JointGroup) -> None:
        self.found = self.missed = self.invented = 0
        self.offsets_s = Decimated(1000)
        self._columns = np.flatnonzero(joints.gripper)
        self._middle = (joints.lower + joints.upper) / 2

    def add(
        self,
        predicted: FloatArray,
        truth: FloatArray,
        known: BoolArray,
        now: FloatArray,
        dt_s: float,
    ) -> None:
        """Take a chunk [horizon, n_joints] from an observation at `now` [n_joints]."""
        if not known.all():
            return
        for column in self._columns:
            middle = self._middle[column]
            side = now[column] > middle
            mine = np.flatnonzero((predicted[:, column] > middle) != side)
            real = np.flatnonzero((truth[:, column] > middle) != side)
            if len(mine) and len(real):
                self.found += 1
                self.offsets_s.add(float((mine[0] - real[0]) * dt_s))
            elif len(real):
                self.missed += 1
            elif len(mine):
                self.invented += 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "found": self.found,
            "missed": self.missed,
            "invented": self.invented,
            "offsets_s": rounded(self.offsets_s.items, 6),
        }


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
        self.windows: list[tuple[float, float, float, float]] = []
        """Duration in s, RMS jerk, LDLJ and SPARC of each; nan where nothing moves."""

    def add(self, positions: FloatArray) -> None:
        """The next sample [n_joints]."""
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
