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
    """Which joints were kept from what was asked for, [n_joints] or [n_steps, n_joints] each."""

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
            position_margin: share of each joint's range kept free at both ends, 0 to below 0.5;
                grippers have none, since they must open and close completely.
            tracking_gain: share of a small error that is corrected per step, above 0 to 1. The
                most nervous is 1: noise in the targets is passed on with nothing taken off.
        """
        if not (np.isfinite(dt_s) and dt_s > 0):
            raise ValueError(f"dt_s must be finite and > 0, got {dt_s}")
        if not 0 <= position_margin < 0.5:
            raise ValueError(f"position_margin must be in [0, 0.5), got {position_margin}")
        if not 0 < tracking_gain <= 1:
            raise ValueError(f"tracking_gain must be in (0, 1], got {tracking_gain}")
        margin = np.where(joints.gripper, 0.0, position_margin * (joints.upper - joints.lower))
        self.joints = joints
        self.dt_s = dt_s
        self.lower = joints.lower + margin
        self.upper = joints.upper - margin
        self.max_velocity = joints.max_velocity
        self.velocity_step = joints.max_acceleration * dt_s
        """[n_joints] how far a velocity may change per step."""
        self._half_dt_s = dt_s / 2
        # Goal, upper limit, lower limit, n_joints values each, for calls that cost a third of those
        # that broadcast rows; only the way to the goal has a linear part.
        self._speed_unit = np.outer((_APPROACH_SHARE, 1.0, 1.0), self.velocity_step).ravel()
        self._distance_unit = self._speed_unit * dt_s
        self._linear = np.repeat((1 / tracking_gain, 1.0, 1.0), len(joints))
        self._linear_end = self._linear**2
        self._shift = self._linear + 0.5
        self._shift_squared = self._shift**2
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
        """One step of `follow`: `target` and `target_velocity` [n_joints]; None: it stands."""
        if target_velocity is None:
            target_velocity = np.zeros_like(self.lower)
        positions, velocities, clamps = self.follow(state, target[None], target_velocity[None])
        first = Clamps(
            clamps.position[0], clamps.velocity[0], clamps.acceleration[0], clamps.held[0]
        )
        return MotionState(positions[0], velocities[0]), first

    def follow(
        self, state: MotionState, targets: FloatArray, target_velocities: FloatArray
    ) -> tuple[FloatArray, FloatArray, Clamps]:
        """Steps of `dt_s`, each towards where the joints should be at its end.

        Args:
            state: at the beginning of the first step.
            targets: [n, n_joints]; joints with a non-finite value brake in that step.
            target_velocities: [n, n_joints] the targets' own velocities then.

        Returns:
            Positions and velocities [n, n_joints] at the steps' ends, and their clamps.
        """
        for what, values in (("targets", targets), ("velocities", target_velocities)):
            if values.ndim != 2 or values.shape[1:] != self.lower.shape:
                raise ValueError(f"need {len(self.joints)} {what} a step, got shape {values.shape}")
        finite = np.isfinite(targets) & np.isfinite(target_velocities)
        unknown = None
        if not finite.all():
            unknown = ~finite
            targets = np.where(finite, targets, self.lower)
            target_velocities = np.where(finite, target_velocities, 0.0)

        goals = np.minimum(np.maximum(targets, self.lower), self.upper)
        beyond = np.abs(targets - goals)
        along = np.minimum(np.maximum(target_velocities, -self.max_velocity), self.max_velocity)
        too_fast = np.abs(target_velocities - along)
        along[beyond > 0] = 0.0

        wanted, capped, bounded, positions, velocities = np.empty((5, *targets.shape))
        rows = (goals - along * self._half_dt_s, along, wanted, capped, bounded, velocities)
        to_goal, ahead, low, high = np.empty((4, len(self.lower)))
        distances = np.empty(3 * len(self.lower))
        to_reach, to_upper, to_lower = distances.reshape(3, -1)
        position, velocity = state.position, state.velocity
        # One step needs the one before it. This runs at each tick: calls are what it costs.
        for k, (base, own, want, cap, bound, next_velocity) in enumerate(zip(*rows, strict=True)):
            # The rest of the step's way that does not depend on the velocity at its end.
            np.multiply(velocity, self._half_dt_s, out=ahead)
            ahead += position
            np.subtract(base, ahead, out=to_goal)
            np.absolute(to_goal, out=to_reach)
            np.subtract(self.upper, ahead, out=to_upper)
            np.subtract(ahead, self.lower, out=to_lower)
            self._turn_into_speeds(distances)
            np.copysign(to_reach, to_goal, out=want)
            want += own
            if unknown is not None:
                want[unknown[k]] = 0.0
            np.maximum(want, -self.max_velocity, out=cap)
            np.minimum(cap, self.max_velocity, out=cap)
            np.maximum(cap, np.negative(to_lower, out=to_lower), out=bound)
            np.minimum(bound, to_upper, out=bound)
            np.subtract(velocity, self.velocity_step, out=low)
            np.add(velocity, self.velocity_step, out=high)
            np.maximum(bound, low, out=next_velocity)
            np.minimum(next_velocity, high, out=next_velocity)
            velocity, position = next_velocity, positions[k]
            np.multiply(velocity, self._half_dt_s, out=position)
            position += ahead

        if unknown is not None:
            beyond[unknown] = 0.0
        clamps = Clamps(
            position=(beyond > self._position_tolerance)
            | (np.abs(bounded - capped) > self._velocity_tolerance),
            velocity=np.maximum(too_fast, np.abs(capped - wanted)) > self._velocity_tolerance,
            acceleration=np.abs(velocities - bounded) > self._velocity_tolerance,
            held=~finite,
        )
        return positions, velocities, clamps

    def _turn_into_speeds(self, distances: FloatArray) -> None:
        """[3 · n_joints] distances to goal, upper, lower → speeds to choose for the step's end.

        Speeds in units of what braking takes off per step, distances in that times dt: the curve
        joins the points (c² + c·n + n(n+1)/2, c + n), n = 0, 1, …, with c = 1/gain, since from
        each of them one step of braking leads to the one before. Below c² it is a line through 0.
        """
        y = np.maximum(distances, 0.0, out=distances)
        y /= self._distance_unit
        y_curve = y - self._linear_end
        np.maximum(y_curve, 0.0, out=y_curve)
        n = y_curve * 2
        n += self._shift_squared
        np.sqrt(n, out=n)
        n -= self._shift
        np.floor(n, out=n)
        # the part of the next unit: (y_curve - n·(c + (n+1)/2)) / (c + n + 1)
        next_n = n + 1
        slope = self._linear + next_n
        next_n *= 0.5
        next_n += self._linear
        next_n *= n
        y_curve -= next_n
        y_curve /= slope
        speeds = np.minimum(y, self._linear_end, out=y)
        speeds /= self._linear
        speeds += n
        speeds += y_curve
        speeds *= self._speed_unit

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
