"""What joint_trajectory_controller takes and what it refuses.

Source: ros2_controllers, `joint_trajectory_controller.cpp`, `validate_trajectory_msg` (the same
rules in Humble, Jazzy, Kilted and 6.9). Three rules are stricter, because the controller lets the
fault through to the motors: non-finite numbers, a joint named twice, and accelerations without
velocities (which it interpolates as zeros).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

ZERO_VELOCITY = float(np.finfo(np.float32).eps)
"""rad/s; the controller takes a last velocity up to this for zero."""


class TrajectoryRejected(ValueError):
    """The controller refuses this trajectory; the message is the reason."""


@dataclass(frozen=True)
class Trajectory:
    """A trajectory_msgs/JointTrajectory as arrays. N points, J joints; rad, m, seconds.

    A field that the message leaves empty is None. The controller also takes messages in which only
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
) -> str | None:
    """Return why a controller of `joint_names` refuses the trajectory, or None if it takes it."""
    reason = _check_names(trajectory.joint_names, joint_names)
    if reason:
        return reason
    times, reason = _as_array("times_from_start", trajectory.times_from_start_s, ndim=1)
    if reason:
        return reason
    if not len(times):
        return "the trajectory is empty"
    fields: dict[str, FloatArray] = {}
    for name in ("positions", "velocities", "accelerations"):
        value = getattr(trajectory, name)
        if value is None and name != "positions":
            continue
        array, reason = _as_array(name, value, ndim=2)
        if reason:
            return reason
        if array.shape != (len(times), len(joint_names)):
            return (
                f"{name} has shape {array.shape}, the trajectory {len(times)} points of "
                f"{len(joint_names)} joints"
            )
        fields[name] = array
    if "accelerations" in fields and "velocities" not in fields:
        return "accelerations are given without velocities"
    if not np.isfinite(trajectory.stamp_s):
        return f"the stamp is not finite: {trajectory.stamp_s}"
    if (np.diff(times) <= 0).any():
        point = int(np.argmax(np.diff(times) <= 0))
        return (
            f"time_from_start is not strictly increasing between points {point} and {point + 1}: "
            f"{times[point]:g} s and {times[point + 1]:g} s"
        )
    if not allow_nonzero_velocity_at_trajectory_end and "velocities" in fields:
        speed = np.abs(fields["velocities"][-1])
        if (speed > ZERO_VELOCITY).any():
            joint = int(np.argmax(speed))
            return (
                f"the last point's velocity is not zero for joint {trajectory.joint_names[joint]}: "
                f"{fields['velocities'][-1, joint]:g}"
            )
    end_s = trajectory.stamp_s + times[-1]
    if trajectory.stamp_s != 0.0 and end_s < now_s:
        return f"the trajectory ends in the past, {now_s - end_s:.3f} s ago"
    return None


def _check_names(given: Sequence[str], expected: Sequence[str]) -> str | None:
    if len(given) != len(expected):
        return f"{len(given)} joints are given, the controller has {len(expected)}"
    unknown = [name for name in given if name not in expected]
    if unknown:
        return f"joint {unknown[0]!r} is not one of the controller's"
    repeated = [name for name in expected if list(given).count(name) != 1]
    if repeated:
        return f"joint {repeated[0]!r} is missing and another one is named twice"
    return None


def _as_array(name: str, value: ArrayLike, ndim: int) -> tuple[FloatArray, str | None]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0), f"{name} is not an array of numbers with one length per point"
    if array.size == 0 and ndim == 1:
        return np.empty(0), None
    if array.ndim != ndim:
        return array, f"{name} must have {ndim} dimensions, it has shape {array.shape}"
    if not np.isfinite(array).all():
        return array, f"{name} is not finite at point {int(np.argwhere(~np.isfinite(array))[0][0])}"
    return array, None
