"""A joint_trajectory_controller in numpy, cycle by cycle, with a position command interface.

Source: ros2_controllers, `joint_trajectory_controller.cpp` (`update`, `topic_callback`,
`validate_trajectory_msg`, `blend_with_active_trajectory`) and `trajectory.cpp` (`sample`), branches
jazzy (4.42), kilted (5.17) and master (6.9) of August 2026. Jazzy and Kilted behave alike here, and
as 6.9 with `allow_trajectory_replacement: false`. Left out: goals and their tolerances,
`cmd_timeout`, speed scaling, partial joints, angle wraparound, `interpolation_method: none`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from pi05_ros.types import FloatArray

ZERO_VELOCITY = float(np.finfo(np.float32).eps)
"""rad/s; the controller takes a last velocity up to this for zero."""


class TrajectoryRejected(ValueError):
    """The controller rejects this trajectory; the message is the reason."""


@dataclass(frozen=True)
class Trajectory:
    """A trajectory_msgs/JointTrajectory as arrays. N points, J joints; rad, m, seconds.

    A field that is empty in the message is None. The controller also accepts messages in which only
    some points have velocities; this class cannot hold them.
    """

    joint_names: Sequence[str]
    stamp_s: float
    """The header's stamp on the controller's clock; 0 means "start now"."""
    times_from_start_s: ArrayLike
    """[N]"""
    positions: ArrayLike
    """[N, J]"""
    velocities: ArrayLike | None = None
    """[N, J]"""
    accelerations: ArrayLike | None = None
    """[N, J]"""


def check_trajectory(
    trajectory: Trajectory,
    joint_names: Sequence[str],
    now_s: float,
    *,
    allow_nonzero_velocity_at_trajectory_end: bool = False,
) -> None:
    """Raise TrajectoryRejected if a controller of `joint_names` rejects the trajectory.

    The rules are those of `validate_trajectory_msg`, the same from Humble to 6.9. Three are
    stricter, because the controller passes these faults on to the motors: non-finite numbers, a
    joint named twice, and accelerations without velocities (which it interpolates as zeros).
    """
    given = list(trajectory.joint_names)
    if len(given) != len(joint_names):
        raise TrajectoryRejected(
            f"{len(given)} joints are given, the controller has {len(joint_names)}"
        )
    for name in given:
        if name not in joint_names:
            raise TrajectoryRejected(f"joint {name!r} is not one of the controller's")
    for name in joint_names:
        if name not in given:
            raise TrajectoryRejected(f"joint {name!r} is missing and another one is named twice")
    times = _checked_array("times_from_start", trajectory.times_from_start_s, ndim=1)
    if not len(times):
        raise TrajectoryRejected("the trajectory is empty")
    arrays = {"positions": _checked_array("positions", trajectory.positions, ndim=2)}
    for name, value in (
        ("velocities", trajectory.velocities),
        ("accelerations", trajectory.accelerations),
    ):
        if value is not None:
            arrays[name] = _checked_array(name, value, ndim=2)
    for name, array in arrays.items():
        if array.shape != (len(times), len(given)):
            raise TrajectoryRejected(
                f"{name} has shape {array.shape}, the trajectory {len(times)} points of "
                f"{len(given)} joints"
            )
    velocities = arrays.get("velocities")
    if "accelerations" in arrays and velocities is None:
        raise TrajectoryRejected("accelerations are given without velocities")
    if not math.isfinite(trajectory.stamp_s):
        raise TrajectoryRejected(f"the stamp is not finite: {trajectory.stamp_s}")
    if (np.diff(times) <= 0).any():
        point = int(np.argmax(np.diff(times) <= 0))
        raise TrajectoryRejected(
            f"time_from_start is not strictly increasing between points {point} and {point + 1}: "
            f"{times[point]:g} s and {times[point + 1]:g} s"
        )
    if velocities is not None and not allow_nonzero_velocity_at_trajectory_end:
        moving = np.flatnonzero(np.abs(velocities[-1]) > ZERO_VELOCITY)
        if len(moving):
            joint = int(moving[0])
            raise TrajectoryRejected(
                f"the last point's velocity is not zero for joint {given[joint]}: "
                f"{velocities[-1, joint]:g}"
            )
    end_s = trajectory.stamp_s + times[-1]
    if trajectory.stamp_s != 0.0 and end_s < now_s:
        raise TrajectoryRejected(f"the trajectory ends in the past, {now_s - end_s:.3f} s ago")


def _checked_array(name: str, value: ArrayLike, ndim: int) -> FloatArray:
    try:
        array: FloatArray = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TrajectoryRejected(
            f"{name} is not an array of numbers with one length per point"
        ) from None
    if array.ndim != ndim:
        raise TrajectoryRejected(f"{name} must have {ndim} dimensions, it has shape {array.shape}")
    if not np.isfinite(array).all():
        point = int(np.argwhere(~np.isfinite(array))[0][0])
        raise TrajectoryRejected(f"{name} is not finite at point {point}")
    return array


@dataclass(frozen=True)
class _Point:
    """One state; [J] each, None where the message or the hardware has no value."""

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
    """The begin of the bridge to a first point in the future; None until the first sample."""
    index: int = 0
    """The segment of the last cycle; earlier ones are complete."""

    def segment(self, time_s: float) -> int:
        """The segment of a time, from `index` on; blended points may go back in time."""
        since_s = time_s - self.start_s
        for index, (a, b) in enumerate(pairwise(self.points[self.index :]), self.index):
            if a.time_s <= since_s < b.time_s:
                return index
        return len(self.points) - 1


class JointTrajectoryController:
    """Accepts or rejects trajectories and computes the positions to command in each cycle.

    `accept` is the topic's callback: an accepted trajectory waits for the next `update`, and a
    newer one replaces it. `update` is one cycle: the waiting trajectory replaces the executed one,
    and the state of one period ahead is commanded.

    Segments are linear, cubic with velocities, quintic with accelerations; the last point is held.
    Points in the past of the cycle are cut off. If all points are in the future, a segment (the
    bridge) leads to the first one. Its begin depends on the ROS parameter
    `interpolate_from_desired_state`:

    - True: the state commanded last, at the time of the cycle that commanded it. That state was
      sampled one period ahead of this time, so a moving joint repeats one period of its motion.
    - False (the parameter's default in every distribution): the measured state, which lags behind
      the commanded one. Without a velocity state interface its velocity counts as zero.

    `allow_trajectory_replacement` exists from 6.8 on, and its default there is True. A trajectory
    that replaces one of several points then starts relative to the cycle that accepts it: until a
    stamp in the future the old trajectory continues, one period late, and a stamp in the past
    counts as now, which delays every point by its age.

    Args:
        joint_names: the controller's joints, in the order of every array that it returns.
        update_rate_hz: cycles per second; the other arguments are named as the ROS parameters, too.

    Raises:
        ValueError: repeated joints, or a rate that is not positive.
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
        if not joint_names or len(set(joint_names)) != len(joint_names):
            raise ValueError(f"joint names must be given once each, got {list(joint_names)}")
        if not update_rate_hz > 0:
            raise ValueError(f"update_rate_hz must be > 0, got {update_rate_hz}")
        self.joint_names = tuple(joint_names)
        self.accepted = self.rejected = 0
        """Numbers of trajectories."""
        self.last_rejection = ""
        self._period_s = 1.0 / update_rate_hz
        self._from_desired = interpolate_from_desired_state
        self._allow_nonzero_end = allow_nonzero_velocity_at_trajectory_end
        self._replacement = allow_trajectory_replacement
        self._zero = np.zeros(len(joint_names))
        self._waiting: Trajectory | None = None
        self._playing: _Playing | None = None
        self._commanded = _Point(math.nan, self._zero, self._zero, None)
        """The state commanded last, at the time of its cycle; NaN before the first."""
        self._cycle_s = self._time_s = 0.0
        """The last cycle's time on the controller's clock, and on the trajectory's."""

    def hold(self, positions: ArrayLike) -> None:
        """Activate: drop every trajectory and hold `positions` [J]."""
        point = _Point(0.0, self._joint_array(positions), None, None)
        self._waiting = None
        self._playing = _Playing([point], 0.0)
        self._commanded = replace(point, time_s=math.nan, velocity=self._zero)

    def accept(self, trajectory: Trajectory, now_s: float) -> None:
        """Accept a trajectory, its joints in any order, for the next `update`.

        TrajectoryRejected if it breaks a rule of `check_trajectory` at `now_s`.
        """
        allow = self._allow_nonzero_end
        try:
            check_trajectory(
                trajectory, self.joint_names, now_s, allow_nonzero_velocity_at_trajectory_end=allow
            )
        except TrajectoryRejected as error:
            self.rejected += 1
            self.last_rejection = str(error)
            raise
        self._waiting = trajectory
        self.accepted += 1

    def update(
        self, now_s: float, positions: ArrayLike, velocities: ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """One cycle, which began at `now_s` on the controller's clock.

        Args:
            now_s: time of the cycle.
            positions: [J] measured.
            velocities: [J] measured; None: the hardware has no velocity state interface.

        Returns:
            The positions [J] that are commanded until the next cycle, and their velocities.
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
        if self._time_s - playing.start_s >= playing.points[0].time_s:
            playing.index = playing.segment(self._time_s)
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
        """The first sample: set the begin of a bridge; its missing derivatives count as zero."""
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

    def _sample(self, playing: _Playing, time_s: float) -> _Point:
        points, since_s = playing.points, time_s - playing.start_s
        if since_s < points[0].time_s:
            assert playing.before is not None
            before = replace(playing.before, time_s=playing.before.time_s - playing.start_s)
            return _interpolate(before, points[0], since_s)
        index = playing.segment(time_s)
        if index + 1 < len(points):
            return _interpolate(points[index], points[index + 1], since_s)
        end, zero = points[-1], self._zero
        velocity = zero if end.velocity is None else end.velocity
        acceleration = zero if end.acceleration is None else end.acceleration
        return replace(end, velocity=velocity, acceleration=acceleration)

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
    mean = step / duration_s
    if a.velocity is None or b.velocity is None:
        return _Point(time_s, a.position + t * mean, mean, np.zeros_like(step))
    if a.acceleration is None or b.acceleration is None:
        # q = q0 + v0·t + c2·t² + c3·t³
        c2 = (3 * mean - 2 * a.velocity - b.velocity) / duration_s
        c3 = (a.velocity + b.velocity - 2 * mean) / duration_s**2
        position = a.position + t * (a.velocity + t * (c2 + t * c3))
        return _Point(time_s, position, a.velocity + t * (2 * c2 + 3 * t * c3), 2 * c2 + 6 * t * c3)
    # In units of the segment: s runs from 0 to 1, derivatives are scaled by the duration.
    v0, v1 = a.velocity * duration_s, b.velocity * duration_s
    a0, a1 = a.acceleration * duration_s**2, b.acceleration * duration_s**2
    c3 = 10 * step - 6 * v0 - 4 * v1 - (3 * a0 - a1) / 2
    c4 = -15 * step + 8 * v0 + 7 * v1 + (3 * a0 - 2 * a1) / 2
    c5 = 6 * step - 3 * (v0 + v1) - (a0 - a1) / 2
    coefficients: FloatArray = np.stack([a.position, v0, a0 / 2, c3, c4, c5])
    powers: FloatArray = (t / duration_s) ** np.arange(6.0)
    first: FloatArray = np.r_[0.0, np.arange(1, 6) * powers[:5]]
    second: FloatArray = np.r_[0.0, 0.0, np.arange(2, 6) * np.arange(1, 5) * powers[:4]]
    velocity, acceleration = first / duration_s @ coefficients, second / duration_s**2
    return _Point(time_s, powers @ coefficients, velocity, acceleration @ coefficients)
