"""A follower in front of the limits that takes the roughness out of the targets, for some lag."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import FloatArray

Targets = Callable[[FloatArray], FloatArray | None]
"""Times [n] → positions [n, n_joints], or None where there are none."""

_TIME_TOLERANCE_S = 1e-6


class TargetFollower:
    """A critically damped second-order low-pass on the targets, joint by joint.

    y'' = ω²·(target - y) - 2ω·y', exact for a target that is constant over a step. The output is
    continuous in position and velocity whatever the targets do, it never overshoots a step, and it
    runs behind a steady motion by `lag_s` = 2/ω. Joints of `exempt` pass unchanged.

    A tick asks for times ahead that the tick after it asks for again, so the states of a course
    are kept, and the next course begins at the state kept for its first time.
    """

    def __init__(self, cutoff_hz: float, exempt: NDArray[np.bool_] | None = None) -> None:
        """Raises ValueError for a cutoff that is not above 0."""
        if not (math.isfinite(cutoff_hz) and cutoff_hz > 0):
            raise ValueError(f"cutoff_hz must be finite and > 0, got {cutoff_hz}")
        # the cascade of two equal poles is 3 dB down at 0.6436 of each pole's frequency
        self._omega = 2 * math.pi * cutoff_hz / math.sqrt(math.sqrt(2.0) - 1.0)
        self._exempt = None if exempt is None else np.array(exempt, dtype=bool)
        self._times_s: FloatArray = np.empty(0)
        self._positions: FloatArray = np.empty((0, 0))
        self._velocities: FloatArray = np.empty((0, 0))

    @property
    def lag_s(self) -> float:
        """How far the output runs behind a steady motion."""
        return 2.0 / self._omega

    def clear(self) -> None:
        """Forget the motion; the next course begins at rest at its first target."""
        self._times_s = np.empty(0)

    def start(self, position: FloatArray) -> None:
        """Begin the next course at rest at `position` [n_joints] instead."""
        self._times_s = np.array([-math.inf])
        self._positions = np.array(position, dtype=np.float64)[None]
        self._velocities = np.zeros_like(self._positions)

    def course(self, times_s: FloatArray, targets: Targets) -> FloatArray | None:
        """The targets at increasing times [n], smoothed: [n, n_joints]."""
        wanted = targets(times_s)
        if wanted is None:
            self.clear()
            return None
        if not len(self._times_s):
            self.start(wanted[0])
        position, velocity = self._kept(float(times_s[0]))
        positions, velocities = [position], [velocity]
        steps_s = np.diff(times_s)
        for step_s, target in zip(steps_s, wanted[1:], strict=True):
            decay = math.exp(-self._omega * step_s)
            gap = position - target
            pull = velocity + self._omega * gap
            position = target + (gap + pull * step_s) * decay
            velocity = (velocity - self._omega * pull * step_s) * decay
            positions.append(position)
            velocities.append(velocity)
        self._times_s = np.array(times_s)
        self._positions, self._velocities = np.stack(positions), np.stack(velocities)
        if self._exempt is None:
            return self._positions
        return np.where(self._exempt, wanted, self._positions)

    def _kept(self, time_s: float) -> tuple[FloatArray, FloatArray]:
        """The state at the latest kept time that is not after `time_s`, moved on to it."""
        row = int(np.searchsorted(self._times_s, time_s + _TIME_TOLERANCE_S, side="right")) - 1
        row = max(row, 0)
        return self._positions[row], self._velocities[row]
