"""The soak's checks of every trajectory: limits, chunk boundaries, the time of its first point."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pi05_ros.types import FloatArray, JointGroup

TOLERANCE = 1e-6
GRID_TOLERANCE = 1e-3
COMMITTED_STEPS = 2
"""A message keeps the commands of the next 40 ms. Two messages whose starts are no farther apart
agree at the later one's first point, even if messages between them were lost."""


@dataclass(frozen=True)
class Points:
    """One controller's trajectory message."""

    stamp_s: float
    positions: FloatArray
    """[n, n_joints]"""
    velocities: FloatArray
    """[n, n_joints]"""


class TrajectoryCheck:
    """Checks the messages of one controller in the order in which they arrive."""

    def __init__(self, joints: JointGroup, columns: list[int], dt_s: float) -> None:
        """`columns`: the controller's joints."""
        self._lower, self._upper = joints.lower[columns], joints.upper[columns]
        self._max_velocity = joints.max_velocity[columns]
        self._velocity_step = joints.max_acceleration[columns] * dt_s
        self._dt_s = dt_s
        self._before: Points | None = None
        self.compared = 0
        """Chunk boundaries in motion at which both messages were compared."""
        self.found: Counter[str] = Counter()
        """Violations by kind; a message may have several."""

    def reset(self) -> None:
        """Compare the next message with none: some were lost, or another process publishes."""
        self._before = None

    def check(self, points: Points, arrival_s: float) -> list[str]:
        """Violations of a message that arrived at `arrival_s`, by kind."""
        wrong = []
        if not self._within_limits(points):
            wrong.append("limits")
        starts = not points.velocities[0].any()
        if points.stamp_s > arrival_s and not starts:
            wrong.append("begins in the future")
        if self._before is not None and not self._continues(self._before, points, starts):
            wrong.append("chunk boundary")
        self._before = points
        self.found.update(wrong)
        return wrong

    def _within_limits(self, points: Points) -> bool:
        positions, velocities = points.positions, points.velocities
        steps = np.abs(np.diff(velocities, axis=0))
        return bool(
            np.isfinite(positions).all()
            and (positions >= self._lower - TOLERANCE).all()
            and (positions <= self._upper + TOLERANCE).all()
            and (np.abs(velocities) <= self._max_velocity + TOLERANCE).all()
            and (steps <= self._velocity_step + TOLERANCE).all()
            and not velocities[-1].any()
        )

    def _continues(self, before: Points, after: Points, starts: bool) -> bool:
        """Whether the motion of `before` continues in `after`, or a new one starts at rest."""
        steps = (after.stamp_s - before.stamp_s) / self._dt_s
        last = len(before.positions) - 1
        if steps > last:
            # The previous motion has ended: the next one starts at rest.
            return starts
        row = round(steps)
        if abs(steps - row) > GRID_TOLERANCE or row < 0:
            return False
        if row > COMMITTED_STEPS:
            return True
        self.compared += not starts
        return bool(
            np.allclose(after.positions[0], before.positions[row], rtol=0.0, atol=TOLERANCE)
            and np.allclose(after.velocities[0], before.velocities[row], rtol=0.0, atol=TOLERANCE)
        )
