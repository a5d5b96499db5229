"""A joint_trajectory_controller in numpy, cycle by cycle, with a position command interface.

Source: ros2_controllers, `joint_trajectory_controller.cpp` (`update`, `topic_callback`,
`blend_with_active_trajectory`) and `trajectory.cpp` (`sample`), branches jazzy (4.42), kilted
(5.17) and master (6.9) of August 2026. Jazzy and Kilted behave alike here, and as 6.9 with
`allow_trajectory_replacement: false`. Left out: goals and their tolerances, `cmd_timeout`, speed
scaling, partial joints, angle wraparound, `interpolation_method: none`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_lab.sim.trajectory_rules import Trajectory, TrajectoryRejected, check_trajectory

__all__ = ["JointTrajectoryController", "Trajectory", "TrajectoryRejected", "check_trajectory"]

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class _Point:
    """One state; [J] each, None where the message or the hardware has nothing."""

    time_s: float
    """From the trajectory's start; on the controller's clock for a state before it."""
    position: FloatArray
    velocity: FloatArray | None
    acceleration: FloatArray | None


@dataclass
class _Playing:
    """The trajectory that is executed."""

    points: list[_Point]
    start_s: float
    """0: the cycle that samples it first."""
    before: _Point | None = None
    """Where it begins if its first point lies in the future; None until the first sample."""
    index: int = 0
    """The segment of the last cycle; earlier ones are over."""


class JointTrajectoryController:
    """Takes or refuses trajectories and gives the positions to command in each cycle.

    `accept` is the topic's callback: a trajectory that is taken waits for the next `update`, and a
    newer one replaces it. `update` is one cycle: the trajectory that waits replaces the one that is
    executed, and the state of one period ahead is commanded.

    Segments are linear, cubic with velocities, quintic with accelerations; the last point is held.
    Points that lie in the past when a trajectory is taken are cut off. If all points lie in the
    future, a segment (the bridge) leads to the first one. Where it begins depends on the ROS
    parameter `interpolate_from_desired_state`:

    - True: at the state commanded last, under the time of the cycle that commanded it. That state
      was sampled one period ahead of this time, so the bridge of a moving joint leads one period
      over the same way.
    - False (the parameter's default in every distribution): at the measured state, which lags
      behind the commanded one. Without a velocity state interface its velocity counts as zero.

    `allow_trajectory_replacement` exists from 6.8 on, and its default there is True. A trajectory
    that replaces one of several points is then placed relative to the cycle that takes it: its
    stamp in the future is approached on the old trajectory's points, one period late, and a stamp
    in the past counts as now, which delays every point by its age.
    """

    def __init__(
        self,
        joint_names: Sequence[str],
        *,
        update_rate_hz: float = 200.0,
        interpolate_from_desired_state: bool = True,
        allow_nonzero_velocity_at_trajectory_end: bool = False,
        allow_trajectory_replacement: bool = False,
    ) -> None:
        """Raises ValueError for repeated joints or a rate that is not positive.

        Args:
            joint_names: the controller's joints, in the order of every array that it returns.
            update_rate_hz: the controller's parameter; one period is 1 / update_rate_hz.
            interpolate_from_desired_state: as the ROS parameter.
            allow_nonzero_velocity_at_trajectory_end: as the ROS parameter.
            allow_trajectory_replacement: as the ROS parameter of 6.8 and later.
        """
        if not joint_names or len(set(joint_names)) != len(joint_names):
            raise ValueError(f"joint names must be given once each, got {list(joint_names)}")
        if not update_rate_hz > 0:
            raise ValueError(f"update_rate_hz must be > 0, got {update_rate_hz}")
        self.joint_names = tuple(joint_names)
        self.accepted = 0
        """Trajectories taken."""
        self.rejected = 0
        """Trajectories refused."""
        self.last_rejection = ""
        self._period_s = 1.0 / update_rate_hz
        self._from_desired = interpolate_from_desired_state
        self._allow_nonzero_end = allow_nonzero_velocity_at_trajectory_end
        self._replacement = allow_trajectory_replacement
        self._zero = np.zeros(len(joint_names))
        self._waiting: Trajectory | None = None
        self._playing: _Playing | None = None
        self._commanded = _Point(math.nan, self._zero, self._zero, None)
        """The state commanded last, under the time of its cycle; NaN before the first."""
        self._cycle_s = self._time_s = 0.0
        """The last cycle's time, and the place in the trajectory that it was at."""

    def hold(self, positions: ArrayLike) -> None:
        """Activate: drop every trajectory and stay at `positions` [J]."""
        point = _Point(0.0, self._joint_array(positions), None, None)
        self._waiting = None
        self._playing = _Playing([point], 0.0)
        self._commanded = replace(point, time_s=math.nan, velocity=self._zero)

    def accept(self, trajectory: Trajectory, now_s: float) -> None:
        """Take a trajectory for the next `update`.

        Args:
            trajectory: its joints may stand in any order.
            now_s: the controller's clock on arrival.

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
        self._waiting = trajectory
        self.accepted += 1

    def update(
        self, now_s: float, positions: ArrayLike, velocities: ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """One cycle at `now_s`.

        Args:
            now_s: the controller's clock when the cycle began.
            positions: [J] measured.
            velocities: [J] measured; None: the hardware has no velocity state interface.

        Returns:
            The positions [J] that are commanded until the next cycle, and their velocities.

        Raises:
            RuntimeError: `hold` was not called.
        """
        if self._playing is None:
            raise RuntimeError("the controller is not active: call hold() with the positions")
        if self._waiting is not None:
            self._playing = self._replaced(self._playing, self._waiting, now_s)
            self._waiting = None
        playing = self._playing
        if playing.before is None:
            self._begin(playing, now_s, positions, velocities)
            self._time_s = now_s
        else:
            self._time_s += now_s - self._cycle_s
        self._cycle_s = now_s
        self._advance(playing, self._time_s)
        state = self._sample(playing, self._time_s + self._period_s)
        self._commanded = replace(state, time_s=now_s)
        assert state.velocity is not None
        return state.position, state.velocity

    def _replaced(self, old: _Playing, trajectory: Trajectory, now_s: float) -> _Playing:
        points = self._to_points(trajectory)
        if not self._replacement or len(old.points) == 1:
            return _Playing(points, trajectory.stamp_s)
        # The old trajectory is at `cursor`, the last cycle's time: one period behind now_s.
        cursor_s = self._time_s
        begin_s = cursor_s + max(0.0, trajectory.stamp_s - now_s)
        blended = [
            replace(point, time_s=old.start_s + point.time_s - cursor_s)
            for point in old.points
            if cursor_s < old.start_s + point.time_s < begin_s
        ]
        delay_s = begin_s - cursor_s
        if points[0].time_s > 0:
            blended.append(replace(self._sample(old, begin_s), time_s=delay_s))
        blended += [replace(point, time_s=delay_s + point.time_s) for point in points]
        return _Playing(blended, 0.0)

    def _begin(
        self, playing: _Playing, now_s: float, positions: ArrayLike, velocities: ArrayLike | None
    ) -> None:
        """The first sample: `before` is where a bridge begins; what it lacks counts as zero."""
        if self._from_desired:
            before = self._commanded
            if math.isnan(before.time_s):
                before = replace(before, time_s=now_s)
        else:
            speeds = None if velocities is None else self._joint_array(velocities)
            before = _Point(now_s, self._joint_array(positions), speeds, None)
        first = playing.points[0]
        if before.velocity is None and first.velocity is not None:
            before = replace(before, velocity=self._zero)
        if before.acceleration is None and first.acceleration is not None:
            before = replace(before, acceleration=self._zero)
        playing.before = before
        playing.start_s = playing.start_s or now_s

    def _advance(self, playing: _Playing, time_s: float) -> None:
        """Put `index` on the segment of `time_s`; blended points may go back in time."""
        points, since_s = playing.points, time_s - playing.start_s
        if since_s < points[0].time_s:
            return
        last = len(points) - 1
        for index in range(playing.index, last):
            if points[index].time_s <= since_s < points[index + 1].time_s:
                playing.index = index
                return
        playing.index = last

    def _sample(self, playing: _Playing, time_s: float) -> _Point:
        points, since_s = playing.points, time_s - playing.start_s
        if since_s < points[0].time_s:
            assert playing.before is not None
            before = replace(playing.before, time_s=playing.before.time_s - playing.start_s)
            return _interpolate(before, points[0], since_s)
        for a, b in zip(points[playing.index :], points[playing.index + 1 :], strict=False):
            if a.time_s <= since_s < b.time_s:
                return _interpolate(a, b, since_s)
        end = points[-1]
        return replace(
            end,
            velocity=self._zero if end.velocity is None else end.velocity,
            acceleration=self._zero if end.acceleration is None else end.acceleration,
        )

    def _to_points(self, trajectory: Trajectory) -> list[_Point]:
        order = [list(trajectory.joint_names).index(name) for name in self.joint_names]
        times_s = np.asarray(trajectory.times_from_start_s, dtype=np.float64).tolist()
        none = [None] * len(times_s)
        positions, velocities, accelerations = (
            none if field is None else list(np.asarray(field, dtype=np.float64)[:, order])
            for field in (trajectory.positions, trajectory.velocities, trajectory.accelerations)
        )
        return [
            _Point(*point)  # type: ignore[arg-type]
            for point in zip(times_s, positions, velocities, accelerations, strict=True)
        ]

    def _joint_array(self, values: ArrayLike) -> FloatArray:
        array = np.array(values, dtype=np.float64)
        if array.shape != (len(self.joint_names),) or not np.isfinite(array).all():
            raise ValueError(f"{len(self.joint_names)} finite values are needed, got {array}")
        return array


def _interpolate(a: _Point, b: _Point, time_s: float) -> _Point:
    """The polynomial of the highest degree that both ends give data for."""
    duration_s, t = b.time_s - a.time_s, time_s - a.time_s
    step = b.position - a.position
    if a.velocity is None or b.velocity is None:
        slope = step / duration_s
        return _Point(time_s, a.position + t * slope, slope, np.zeros_like(step))
    mean = step / duration_s
    if a.acceleration is None or b.acceleration is None:
        # q = q0 + v0·t + c2·t² + c3·t³
        c2 = (3 * mean - 2 * a.velocity - b.velocity) / duration_s
        c3 = (a.velocity + b.velocity - 2 * mean) / duration_s**2
        return _Point(
            time_s,
            a.position + t * (a.velocity + t * (c2 + t * c3)),
            a.velocity + t * (2 * c2 + 3 * t * c3),
            2 * c2 + 6 * t * c3,
        )
    # In units of the segment: s runs from 0 to 1, derivatives are scaled by the duration.
    v0, v1 = a.velocity * duration_s, b.velocity * duration_s
    a0, a1 = a.acceleration * duration_s**2, b.acceleration * duration_s**2
    coefficients: FloatArray = np.stack(
        [
            a.position,
            v0,
            a0 / 2,
            10 * step - 6 * v0 - 4 * v1 - (3 * a0 - a1) / 2,
            -15 * step + 8 * v0 + 7 * v1 + (3 * a0 - 2 * a1) / 2,
            6 * step - 3 * (v0 + v1) - (a0 - a1) / 2,
        ]
    )
    s = t / duration_s
    powers: FloatArray = s ** np.arange(6.0)
    first: FloatArray = np.r_[0.0, np.arange(1, 6) * powers[:5]] / duration_s
    second: FloatArray = (
        np.r_[0.0, 0.0, np.arange(2, 6) * np.arange(1, 5) * powers[:4]] / duration_s**2
    )
    return _Point(time_s, powers @ coefficients, first @ coefficients, second @ coefficients)
