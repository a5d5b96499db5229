"""A joint_trajectory_controller in numpy: which state the joints should be in, and when.

Source: ros2_controllers, `joint_trajectory_controller.cpp` and `trajectory.cpp`, branches humble,
jazzy, kilted and 6.9 of August 2026; with `interpolate_from_desired_state: true`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_ros.sim.trajectory_rules import Trajectory, TrajectoryRejected, check_trajectory

__all__ = ["JointTrajectoryController", "Trajectory", "TrajectoryRejected", "check_trajectory"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class _Knot:
    """One point on the controller's clock; [J] each, None where the message gave nothing."""

    time_s: float
    position: FloatArray
    velocity: FloatArray | None
    acceleration: FloatArray | None


class JointTrajectoryController:
    """Takes or refuses trajectories and says what is desired at any time.

    Between points it interpolates linearly, with velocities by cubic and with accelerations by
    quintic polynomials, and after the last point it stays there. A trajectory that is taken starts
    from the state that is desired then, so the motion is continuous as long as the first point
    lies in the future. Points in the past are cut off, and what is left is followed at once: there
    the sender has to meet the running trajectory.

    A stamp in the future is where the distributions differ. Up to Kilted the running trajectory
    ends on arrival and a bridge leads to the first new point: the default here. From 6.8 on,
    `allow_trajectory_replacement` (there the default) lets the running one go on until the stamp,
    and a stamp in the past then counts as now, so that everything runs late by its age.

    Args:
        joint_names: the controller's joints, in the order of every array that it returns.
        allow_nonzero_velocity_at_trajectory_end: as the ROS parameter.
        allow_trajectory_replacement: as the ROS parameter of version 6.8.

    Attributes:
        accepted: trajectories taken.
        rejected: trajectories refused.
        last_rejection: the last reason, or "".
    """

    def __init__(
        self,
        joint_names: Sequence[str],
        *,
        allow_nonzero_velocity_at_trajectory_end: bool = False,
        allow_trajectory_replacement: bool = False,
    ) -> None:
        if not joint_names or len(set(joint_names)) != len(joint_names):
            raise ValueError(f"joint names must be given once each, got {list(joint_names)}")
        self.joint_names = tuple(joint_names)
        self.accepted = 0
        self.rejected = 0
        self.last_rejection = ""
        self._allow_nonzero_end = allow_nonzero_velocity_at_trajectory_end
        self._splice = allow_trajectory_replacement
        self._knots: list[_Knot] = []

    def hold(self, positions: ArrayLike, now_s: float) -> None:
        """Drop every trajectory and stay at `positions` [J], as on activation."""
        self._knots = [_Knot(now_s, self._joint_array(positions), None, None)]

    def accept(self, trajectory: Trajectory, now_s: float, current_positions: ArrayLike) -> None:
        """Replace the running trajectory.

        Args:
            trajectory: its joints may stand in any order.
            now_s: the controller's clock.
            current_positions: [J] measured; the start if nothing has been commanded so far.

        Raises:
            TrajectoryRejected: one of the rules in `trajectory_rules` is broken.
        """
        reason = check_trajectory(
            trajectory,
            self.joint_names,
            now_s,
            allow_nonzero_velocity_at_trajectory_end=self._allow_nonzero_end,
        )
        if reason:
            self.rejected += 1
            self.last_rejection = reason
            raise TrajectoryRejected(reason)
        if not self._knots:
            self.hold(current_positions, now_s)
        splice = self._splice and len(self._knots) > 1
        start_s = trajectory.stamp_s or now_s
        if splice:
            start_s = max(start_s, now_s)
        new = self._to_knots(trajectory, start_s)
        first_s = new[0].time_s
        kept = [self._desired(now_s)] if now_s < first_s else []
        if splice and start_s > now_s:
            kept = [self._desired(now_s)]
            kept += [knot for knot in self._knots if now_s < knot.time_s < start_s]
            kept += [self._desired(start_s)] if start_s < first_s else []
        self._knots = kept + new
        self.accepted += 1

    def sample(self, now_s: float) -> tuple[FloatArray, FloatArray]:
        """Return the desired positions [J] and velocities [J] at `now_s`.

        Raises:
            RuntimeError: nothing was accepted and `hold` was not called.
        """
        if not self._knots:
            raise RuntimeError("the controller has no state yet: call hold() with the positions")
        knot = self._desired(now_s)
        assert knot.velocity is not None
        return knot.position, knot.velocity

    def _desired(self, time_s: float) -> _Knot:
        index = bisect_right(self._knots, time_s, key=lambda knot: knot.time_s)
        if 0 < index < len(self._knots):
            return _interpolate(self._knots[index - 1], self._knots[index], time_s)
        end = self._knots[max(index - 1, 0)]
        zero = np.zeros(len(self.joint_names))
        return replace(
            end,
            time_s=time_s,
            velocity=zero if end.velocity is None else end.velocity,
            acceleration=zero if end.acceleration is None else end.acceleration,
        )

    def _to_knots(self, trajectory: Trajectory, start_s: float) -> list[_Knot]:
        order = [list(trajectory.joint_names).index(name) for name in self.joint_names]
        columns = [
            None if field is None else np.asarray(field, dtype=np.float64)[:, order]
            for field in (trajectory.positions, trajectory.velocities, trajectory.accelerations)
        ]
        times = start_s + np.asarray(trajectory.times_from_start_s, dtype=np.float64)
        positions, velocities, accelerations = columns
        assert positions is not None
        return [
            _Knot(
                float(time),
                positions[i],
                None if velocities is None else velocities[i],
                None if accelerations is None else accelerations[i],
            )
            for i, time in enumerate(times)
        ]

    def _joint_array(self, values: ArrayLike) -> FloatArray:
        array = np.array(values, dtype=np.float64)
        if array.shape != (len(self.joint_names),) or not np.isfinite(array).all():
            raise ValueError(f"{len(self.joint_names)} finite positions are needed, got {array}")
        return array


def _interpolate(a: _Knot, b: _Knot, time_s: float) -> _Knot:
    """The polynomial of the highest degree that both ends give data for."""
    duration, t = b.time_s - a.time_s, time_s - a.time_s
    # In units of the segment: s runs from 0 to 1, derivatives are scaled by the duration.
    s = t / duration
    step = b.position - a.position
    if a.velocity is None or b.velocity is None:
        linear: FloatArray = a.position + s * step
        slope: FloatArray = step / duration
        return _Knot(time_s, linear, slope, np.zeros_like(step))
    v0, v1 = a.velocity * duration, b.velocity * duration
    if a.acceleration is None or b.acceleration is None:
        tail = [3 * step - 2 * v0 - v1, v0 + v1 - 2 * step]
    else:
        a0, a1 = a.acceleration * duration**2, b.acceleration * duration**2
        tail = [
            a0 / 2,
            10 * step - 6 * v0 - 4 * v1 - (3 * a0 - a1) / 2,
            -15 * step + 8 * v0 + 7 * v1 + (3 * a0 - 2 * a1) / 2,
            6 * step - 3 * (v0 + v1) - (a0 - a1) / 2,
        ]
    coefficients: FloatArray = np.stack([a.position, v0, *tail])
    powers = np.arange(len(coefficients), dtype=np.float64)
    basis: FloatArray = s**powers
    first: FloatArray = np.r_[0.0, powers[1:] * s ** powers[:-1]] / duration
    second: FloatArray = np.r_[0.0, 0.0, powers[2:] * powers[1:-1] * s ** powers[:-2]] / duration**2
    position = basis @ coefficients
    return _Knot(time_s, position, first @ coefficients, second @ coefficients)
