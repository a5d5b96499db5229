"""A first command that is far from where the robot stands: go there slowly, or not at all."""

from __future__ import annotations

import math

import numpy as np

from pi05_ros.types import FloatArray, JointGroup

FIRST_COMMANDS = ("ramp", "refuse")

_PEAK = 1.5
"""Largest slope of the smooth step 3s² - 2s³."""


class Approach:
    """Leads from the measured positions into a plan that begins elsewhere.

    Only a plan whose first target is farther than `distance` from a joint is touched: its targets
    are mixed with the positions at the start, by a share that rises smoothly from 0 to 1 in the
    time that keeps every joint's speed on that way within `speed` of its limit. Grippers are left
    alone: closed where the policy wants them open is nothing unusual.
    """

    def __init__(
        self, joints: JointGroup, mode: str = "ramp", distance: float = 0.5, speed: float = 0.25
    ) -> None:
        """Raises ValueError out of range.

        Args:
            joints: names and velocity limits.
            mode: one of `FIRST_COMMANDS`.
            distance: rad or m from which on a first target counts as far.
            speed: share of the velocity limits, above 0 to 1.
        """
        if mode not in FIRST_COMMANDS:
            raise ValueError(f"first_command {mode!r}: choose one of {', '.join(FIRST_COMMANDS)}")
        if not (math.isfinite(distance) and distance >= 0):
            raise ValueError(f"first_command_distance must be finite and >= 0, got {distance}")
        if not 0 < speed <= 1:
            raise ValueError(f"first_command_speed must be above 0 and at most 1, got {speed}")
        self._joints = joints
        self._mode = mode
        self._distance = distance
        self._speed = speed
        self._from: FloatArray = np.empty(0)
        self._start_s = self._end_s = -math.inf

    def begin(self, positions: FloatArray, target: FloatArray, now_s: float) -> str | None:
        """From `positions` [n_joints] towards the first `target` [n_joints] of a plan, in its time.

        Returns why the motion must not start, in mode `refuse`.
        """
        away = np.where(self._joints.gripper, 0.0, np.abs(target - positions))
        worst = int(np.argmax(away))
        self._start_s = self._end_s = now_s
        if away[worst] <= self._distance:
            return None
        if self._mode == "refuse":
            return (
                f"first command: joint {self._joints.names[worst]!r} is at "
                f"{positions[worst]:.3f} and would go to {target[worst]:.3f}, limit "
                f"{self._distance:g} away; move it closer, or set faults.first_command to ramp"
            )
        self._from = positions.copy()
        duration_s = _PEAK * float(np.max(away / (self._speed * self._joints.max_velocity)))
        self._end_s = now_s + duration_s
        return None

    def course(self, times_s: FloatArray, targets: FloatArray) -> FloatArray:
        """[n] times, [n, n_joints] targets → the targets to follow there."""
        if self._end_s <= self._start_s or times_s[0] >= self._end_s:
            return targets
        share = np.clip((times_s - self._start_s) / (self._end_s - self._start_s), 0.0, 1.0)
        share = (share * share * (3.0 - 2.0 * share))[:, None]
        mixed = self._from + share * (targets - self._from)
        return np.where(self._joints.gripper, targets, mixed)
