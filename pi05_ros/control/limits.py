"""Position, velocity and acceleration limits for a stream of joint targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import FloatArray, JointGroup

BoolArray = NDArray[np.bool_]

_CLAMP_TOLERANCE = 1e-6
"""Share of a limit below which a difference counts as rounding, not as a clamp."""

_APPROACH_SHARE = 0.7
"""Share of the acceleration limit for braking at the goal; the rest is for a goal that brakes."""


@dataclass(frozen=True)
class MotionState:
    """What the joints are commanded to do at one moment."""

    position: FloatArray
    """[n_joints] rad or m."""
    velocity: FloatArray
    """[n_joints] rad/s or m/s."""


@dataclass(frozen=True)
class Clamps:
    """Which joints were kept from what was asked for in one step, [n_joints] each."""

    position: BoolArray
    velocity: BoolArray
    acceleration: BoolArray
    held: BoolArray
    """Braked, because the target was not finite."""


class MotionLimiter:
    """Follows targets on a time grid and keeps each joint's limits, for any input.

    Each joint is a double integrator whose acceleration is constant over a step:
    q' = q + (v + v')·dt/2. The cubic Hermite segment between two states, which is how
    joint_trajectory_controller interpolates positions and velocities, is then this parabola
    itself, so limits that hold for the steps hold between them.

    The velocity at a step's end is the target's own plus one that closes the distance without
    overshoot: linear in the distance nearby (`tracking_gain`·distance/dt), and far away on the
    curve from which braking at a constant rate, one grid step after the other, ends in the linear
    part. A target that moves within the limits is followed without lag.

    The same curve with full braking and no linear part, laid before a position limit, gives the
    largest velocity from which the joint can still stop there. No step exceeds it, and since one
    step of braking leads from the curve to the curve, the next step can always obey as well.

    A joint that starts beyond a position limit moves inward only, as far as its momentum allows;
    one that starts too fast brakes with full acceleration.
    """

    def __init__(
        self,
        joints: JointGroup,
        dt_s: float,
        position_margin: float = 0.0,
        tracking_gain: float = 0.5,
    ) -> None:
        """Raises ValueError for values outside these ranges.

        Args:
            joints: limits in the controller's units.
            dt_s: length of a step.
            position_margin: share of each joint's range kept free at both ends, 0 to below 0.5.
            tracking_gain: share of a small error that is corrected per step, above 0 to 1. The
                most nervous is 1: noise in the targets is passed on with nothing taken off.
        """
        if not (np.isfinite(dt_s) and dt_s > 0):
            raise ValueError(f"dt_s must be finite and > 0, got {dt_s}")
        if not 0 <= position_margin < 0.5:
            raise ValueError(f"position_margin must be in [0, 0.5), got {position_margin}")
        if not 0 < tracking_gain <= 1:
            raise ValueError(f"tracking_gain must be in (0, 1], got {tracking_gain}")
        margin = position_margin * (joints.upper - joints.lower)
        self.joints = joints
        self.dt_s = dt_s
        self.lower = joints.lower + margin
        self.upper = joints.upper - margin
        self.max_velocity = joints.max_velocity
        self.velocity_step = joints.max_acceleration * dt_s
        """[n_joints] how far a velocity may change per step."""
        self._half_dt_s = dt_s / 2
        # Rows: goal, upper limit, lower limit; only the way to the goal has a linear part.
        self._speed_unit = np.outer((_APPROACH_SHARE, 1.0, 1.0), self.velocity_step)
        self._distance_unit = self._speed_unit * dt_s
        self._linear = np.array([[1 / tracking_gain], [1.0], [1.0]])
        self._linear_end = self._linear**2
        self._shift = self._linear + 0.5
        self._position_tolerance = _CLAMP_TOLERANCE * (self.upper - self.lower)
        self._velocity_tolerance = _CLAMP_TOLERANCE * np.minimum(
            self.max_velocity, self.velocity_step
        )

    def at_rest(self, position: FloatArray) -> MotionState:
        """[n_joints] positions, standing; a non-finite one raises ValueError naming the joint."""
        position = np.array(position, dtype=np.float64)
        if position.shape != (len(self.joints),):
            raise ValueError(f"need {len(self.joints)} joint positions, got shape {position.shape}")
        if not np.isfinite(position).all():
            joint = self.joints.names[int(np.argmin(np.isfinite(position)))]
            raise ValueError(f"joint {joint!r}: the position is not finite: {position}")
        return MotionState(position, np.zeros_like(position))

    def step(
        self, state: MotionState, target: FloatArray, target_velocity: FloatArray | None = None
    ) -> tuple[MotionState, Clamps]:
        """One step of `dt_s` towards where the joints should be at its end.

        Args:
            state: at the beginning of the step.
            target: [n_joints]; joints with a non-finite value brake.
            target_velocity: [n_joints] the target's own velocity then; None: it stands.
        """
        if target.shape != self.lower.shape:
            raise ValueError(f"need {len(self.joints)} targets, got shape {target.shape}")
        if target_velocity is None:
            target_velocity = np.zeros_like(self.lower)
        elif target_velocity.shape != self.lower.shape:
            raise ValueError(f"need {len(self.joints)} velocities, got {target_velocity.shape}")
        finite = np.isfinite(target) & np.isfinite(target_velocity)
        all_finite = bool(finite.all())
        if not all_finite:
            target = np.where(finite, target, state.position)
            target_velocity = np.where(finite, target_velocity, 0.0)

        goal = np.minimum(np.maximum(target, self.lower), self.upper)
        beyond = np.abs(target - goal)
        along = np.minimum(np.maximum(target_velocity, -self.max_velocity), self.max_velocity)
        too_fast = np.abs(target_velocity - along)
        along[beyond > 0] = 0.0

        # The rest of the step's way that does not depend on the velocity at its end.
        ahead = state.position + self._half_dt_s * state.velocity
        to_goal = goal - along * self._half_dt_s - ahead
        speeds = self._approach_speeds(
            np.stack((np.abs(to_goal), self.upper - ahead, ahead - self.lower))
        )
        wanted = along + np.copysign(speeds[0], to_goal)
        if not all_finite:
            wanted = np.where(finite, wanted, 0.0)
            beyond = np.where(finite, beyond, 0.0)

        capped = np.minimum(np.maximum(wanted, -self.max_velocity), self.max_velocity)
        bounded = np.minimum(np.maximum(capped, -speeds[2]), speeds[1])
        low = state.velocity - self.velocity_step
        velocity = np.minimum(np.maximum(bounded, low), state.velocity + self.velocity_step)
        clamps = Clamps(
            position=(beyond > self._position_tolerance)
            | (np.abs(bounded - capped) > self._velocity_tolerance),
            velocity=np.maximum(too_fast, np.abs(capped - wanted)) > self._velocity_tolerance,
            acceleration=np.abs(velocity - bounded) > self._velocity_tolerance,
            held=~finite,
        )
        return MotionState(ahead + self._half_dt_s * velocity, velocity), clamps

    def _approach_speeds(self, distances: FloatArray) -> FloatArray:
        """[3, n_joints] distances to goal, upper, lower → speeds to choose for the step's end.

        Speeds in units of what braking takes off per step, distances in that times dt: the curve
        joins the points (c² + c·n + n(n+1)/2, c + n), n = 0, 1, …, with c = 1/gain, since from
        each of them one step of braking leads to the one before. Below c² it is a line through 0.
        """
        y = np.maximum(distances, 0.0) / self._distance_unit
        y_curve = np.maximum(y - self._linear_end, 0.0)
        n = np.floor(np.sqrt(self._shift**2 + 2 * y_curve) - self._shift)
        part = (y_curve - n * (self._linear + 0.5 * (n + 1))) / (self._linear + n + 1)
        speeds = np.minimum(y, self._linear_end) / self._linear + n + part
        return np.asarray(speeds * self._speed_unit)

    def brake(self, state: MotionState) -> MotionState:
        """One step towards zero velocity."""
        velocity = np.copysign(
            np.maximum(np.abs(state.velocity) - self.velocity_step, 0.0), state.velocity
        )
        position = state.position + self._half_dt_s * (state.velocity + velocity)
        return MotionState(position, velocity)

    def brake_to_rest(self, state: MotionState) -> tuple[FloatArray, FloatArray]:
        """All steps to exactly zero velocity, at least one: positions, velocities [n, n_joints]."""
        speed = np.abs(state.velocity)
        # The tolerance keeps rounding from adding a step; what it leaves is set to zero below.
        steps = max(1, int(np.ceil((speed / self.velocity_step).max() - 1e-9)))
        braked = np.arange(1, steps + 1)[:, None] * self.velocity_step
        velocities = np.copysign(np.maximum(speed - braked, 0.0), state.velocity)
        velocities[-1] = 0.0
        before = np.vstack((state.velocity, velocities[:-1]))
        moved = np.cumsum(self._half_dt_s * (before + velocities), axis=0)
        return state.position + moved, velocities
