"""Position, velocity and acceleration limits for a stream of joint targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import FloatArray, JointGroup

BoolArray = NDArray[np.bool_]

_CLAMP_TOLERANCE = 1e-6
"""Share of a limit; smaller differences are rounding, not clamps."""

_APPROACH_SHARE = 0.7
"""Share of the acceleration limit for braking at a target; the rest is for one that brakes."""


@dataclass(frozen=True)
class MotionState:
    """Commanded position and velocity at one time."""

    position: FloatArray
    """[n_joints] rad or m."""
    velocity: FloatArray
    """[n_joints] rad/s or m/s."""


class Clamps(NamedTuple):
    """Which joints did not get the target, by limit; [n_joints] or [n_steps, n_joints] each."""

    position: BoolArray
    velocity: BoolArray
    acceleration: BoolArray
    held: BoolArray
    """Braked, because the target was not finite."""


class MotionLimiter:
    """Follows targets on a time grid within each joint's limits, for any input.

    Each joint is a double integrator with constant acceleration over a step:
    q' = q + (v + v')·dt/2. joint_trajectory_controller interpolates the two states by a cubic
    Hermite segment, which here equals this parabola, so limits that hold at the steps hold between
    them.

    The velocity at a step's end is the target's own plus an approach speed that depends on the
    distance d. The points of the curve are one braking step apart, so braking at a constant rate
    leads from each point to the one before, and there is no overshoot:

        speed
          |               * n = 2        units: speed u = braking rate · dt, distance u·dt
          |          *  n = 1            c = 1/tracking_gain
          |      *  n = 0: (c², c)       points (c² + c·n + n(n+1)/2, c + n), joined by lines
          |   /                          below c²: speed = tracking_gain · d/dt
          +------------------ d

    The same curve with full braking and c = 1, applied to the distance to a position limit, gives
    the largest velocity from which the joint can still stop there. Since one braking step leads
    from the curve to the curve, the next step can always obey as well.

    A target that moves within the limits is followed without lag. A joint that starts beyond a
    position limit moves inward only, as far as its momentum allows; one that starts too fast brakes
    with full acceleration.
    """

    def __init__(
        self,
        joints: JointGroup,
        dt_s: float,
        position_margin: float = 0.0,
        tracking_gain: float = 0.5,
    ) -> None:
        """Raises ValueError out of range.

        Args:
            joints: limits in the controller's units.
            dt_s: length of a step.
            position_margin: share of each joint's range kept free at both ends, 0 to below 0.5;
                none for grippers, which must open and close completely.
            tracking_gain: share of a small error that is corrected per step, above 0 to 1; 1 passes
                target noise through unfiltered.
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
        """[n_joints] largest change of velocity per step."""
        self._half_dt_s = dt_s / 2
        # For target, upper and lower limit, n_joints values each in one flat array: calls on rows
        # that broadcast cost three times as much.
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
        """At rest at `position` [n_joints]; a non-finite one raises ValueError with the joint."""
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
        """One step of `follow`: `target`, `target_velocity` [n_joints]; None: target at rest."""
        if target_velocity is None:
            target_velocity = np.zeros_like(self.lower)
        positions, velocities, clamps = self.follow(state, target[None], target_velocity[None])
        return MotionState(positions[0], velocities[0]), Clamps(*(kind[0] for kind in clamps))

    def follow(
        self, state: MotionState, targets: FloatArray, target_velocities: FloatArray
    ) -> tuple[FloatArray, FloatArray, Clamps]:
        """Steps of `dt_s` towards the targets at their ends.

        Args:
            state: at the start of the first step.
            targets: [n, n_joints]; a joint with a non-finite value brakes in that step.
            target_velocities: [n, n_joints].

        Returns:
            Positions and velocities [n, n_joints] at the steps' ends, and the clamps.
        """
        for what, values in (("targets", targets), ("velocities", target_velocities)):
            if values.ndim != 2 or values.shape[1:] != self.lower.shape:
                raise ValueError(f"need {len(self.joints)} {what} a step, got shape {values.shape}")
        finite = np.isfinite(targets) & np.isfinite(target_velocities)
        invalid = None
        if not finite.all():
            invalid = ~finite
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
        # Each step needs the one before it. The cost of a tick is the number of numpy calls here.
        for k, (base, own, want, cap, bound, next_velocity) in enumerate(zip(*rows, strict=True)):
            # The part of the step's motion that does not depend on the velocity at its end.
            np.multiply(velocity, self._half_dt_s, out=ahead)
            ahead += position
            np.subtract(base, ahead, out=to_goal)
            np.absolute(to_goal, out=to_reach)
            np.subtract(self.upper, ahead, out=to_upper)
            np.subtract(ahead, self.lower, out=to_lower)
            self._to_speeds(distances)
            np.copysign(to_reach, to_goal, out=want)
            want += own
            if invalid is not None:
                want[invalid[k]] = 0.0
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

        if invalid is not None:
            beyond[invalid] = 0.0
        clamps = Clamps(
            position=(beyond > self._position_tolerance)
            | (np.abs(bounded - capped) > self._velocity_tolerance),
            velocity=np.maximum(too_fast, np.abs(capped - wanted)) > self._velocity_tolerance,
            acceleration=np.abs(velocities - bounded) > self._velocity_tolerance,
            held=~finite,
        )
        return positions, velocities, clamps

    def _to_speeds(self, distances: FloatArray) -> None:
        """[3 · n_joints] distances to target, upper, lower → speeds on the curve, in place.

        y is the distance and n the index of the point below it, in the units of the class's figure.
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
        # The share of the way to the next point: (y_curve - n·(c + (n+1)/2)) / (c + n + 1).
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

    def brake_to_rest(self, state: MotionState) -> tuple[FloatArray, FloatArray]:
        """All steps to exactly zero velocity, at least one: positions, velocities [n, n_joints]."""
        speed = np.abs(state.velocity)
        # The tolerance keeps rounding from adding a step; the remainder is set to zero below.
        steps = max(1, int(np.ceil((speed / self.velocity_step).max() - 1e-9)))
        braked = np.arange(1, steps + 1)[:, None] * self.velocity_step
        velocities = np.copysign(np.maximum(speed - braked, 0.0), state.velocity)
        velocities[-1] = 0.0
        before = np.vstack((state.velocity, velocities[:-1]))
        moved = np.cumsum(self._half_dt_s * (before + velocities), axis=0)
        return state.position + moved, velocities
