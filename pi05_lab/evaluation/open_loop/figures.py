"""What an evaluation of one recording adds up, by episode and by policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_lab.evaluation.open_loop.metrics import ErrorSums, GripperTally, MotionWindows
from pi05_lab.evaluation.open_loop.series import Decimated, rounded
from pi05_ros.types import FloatArray, JointGroup

TRACE_POINTS = 600
TRACE_CHUNKS = 60
CHUNK_POINTS = 12
_RANGE_SAMPLES = 2000


@dataclass
class Executed:
    """The motion that one scheduler and the limits make."""

    windows: MotionWindows
    absolute: FloatArray
    """[n_joints] sum of |commanded − recorded|."""
    ticks: int = 0


class TrackFigures:
    """One policy in one episode."""

    def __init__(
        self, horizon: int, joints: JointGroup, dt_s: float, schedulers: tuple[str, ...]
    ) -> None:
        self._horizon = horizon
        self._joints = joints
        self.errors: dict[str, ErrorSums] = {}
        self.grippers: dict[str, GripperTally] = {}
        self.shifts: dict[str, list[float]] = {}
        """Condition → sum over chunks of the mean |Δ| to the plain chunk in rad, and chunks."""
        arm = np.flatnonzero(~joints.gripper)
        self.executed = {
            name: Executed(MotionWindows(dt_s, arm), np.zeros(len(joints))) for name in schedulers
        }

    def error(self, condition: str) -> ErrorSums:
        return self.errors.setdefault(condition, ErrorSums(self._horizon, len(self._joints)))

    def gripper(self, condition: str) -> GripperTally:
        return self.grippers.setdefault(condition, GripperTally(self._joints))

    def end(self) -> None:
        for executed in self.executed.values():
            executed.windows.end()

    def to_dict(self) -> dict[str, Any]:
        arm = ~self._joints.gripper
        return {
            "errors": {name: sums.to_dict(arm) for name, sums in self.errors.items()},
            "grippers": {name: tally.to_dict() for name, tally in self.grippers.items()},
            "shifts": {name: [round(a, 9), int(b)] for name, (a, b) in self.shifts.items()},
            "executed": {
                name: {
                    "windows": each.windows.to_list(),
                    "by_joint": rounded(each.absolute, 9),
                    "ticks": each.ticks,
                }
                for name, each in self.executed.items()
            },
        }


class Episode:
    """A stretch of a recording with one instruction."""

    def __init__(self, instruction: str, start_s: float, joints: JointGroup, dt_s: float) -> None:
        self.instruction = instruction
        self.start_s = start_s
        self.end_s = start_s
        self.tracks: dict[str, TrackFigures] = {}
        self.recorded = MotionWindows(dt_s, np.flatnonzero(~joints.gripper))
        self.positions = Decimated(_RANGE_SAMPLES)

    def end(self, now_s: float) -> None:
        self.end_s = now_s
        self.recorded.end()
        for track in self.tracks.values():
            track.end()

    def to_dict(self, origin_s: float) -> dict[str, Any]:
        return {
            "instruction": self.instruction,
            "start_s": round(self.start_s - origin_s, 3),
            "duration_s": round(self.end_s - self.start_s, 3),
            "recorded_windows": self.recorded.to_list(),
            "positions": rounded(np.array(self.positions.items), 5) if self.positions.count else [],
            "tracks": {name: track.to_dict() for name, track in self.tracks.items()},
        }


class Traces:
    """What is drawn of one policy: thinned out until it fits on a page."""

    def __init__(self) -> None:
        self.motion = Decimated(TRACE_POINTS)
        """(time, recorded [n], scheduler → commanded [n])."""
        self.chunks = Decimated(TRACE_CHUNKS)
        """(stamp, times [m], positions [m, n])."""
        self.dots = Decimated(TRACE_POINTS // 2)
        """(stamp, first step [n])."""
        self.errors = Decimated(TRACE_POINTS)
        """(stamp, error of the policy, error of holding still), rad."""

    def add_chunk(self, stamp_s: float, dt_s: float, positions: FloatArray) -> None:
        rows = np.unique(np.linspace(0, len(positions) - 1, CHUNK_POINTS).round().astype(int))
        self.chunks.add((stamp_s, stamp_s + dt_s * rows, positions[rows]))
        self.dots.add((stamp_s, positions[0]))

    def to_dict(self, origin_s: float) -> dict[str, Any]:
        motion = self.motion.items
        schedulers = sorted({name for _, _, commanded in motion for name in commanded})
        blank = np.full(len(motion[0][1]), np.nan) if motion else np.zeros(0)
        return {
            "times_s": rounded([t - origin_s for t, _, _ in motion], 4),
            "recorded": rounded(np.array([recorded for _, recorded, _ in motion]), 4),
            "commanded": {
                name: rounded(np.array([c.get(name, blank) for _, _, c in motion]), 4)
                for name in schedulers
            },
            "dots": [[round(t - origin_s, 4), rounded(row, 4)] for t, row in self.dots.items],
            "chunks": [
                [rounded(times - origin_s, 4), rounded(rows, 4)]
                for _, times, rows in self.chunks.items
            ],
            "errors": [
                rounded((t - origin_s, mine, hold), 5) for t, mine, hold in self.errors.items
            ],
        }
