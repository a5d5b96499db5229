"""Control: action chunks become stamped trajectories that keep the robot's limits. numpy only.

Everything here is in the controller's units (rad, or m for a prismatic gripper) and seconds on
the clock of the observation stamps.
"""

from pi05_ros.control.latency import LatencySummary, LatencyTracker
from pi05_ros.control.limits import Clamps, MotionLimiter, MotionState
from pi05_ros.control.scheduler import (
    SCHEDULERS,
    ChunkScheduler,
    SchedulerStatistics,
    make_scheduler,
)
from pi05_ros.control.trajectory import (
    ClampCounts,
    ClockJumpedBackError,
    CommandStream,
    TrajectoryPoints,
)

__all__ = [
    "SCHEDULERS",
    "ChunkScheduler",
    "ClampCounts",
    "Clamps",
    "ClockJumpedBackError",
    "CommandStream",
    "LatencySummary",
    "LatencyTracker",
    "MotionLimiter",
    "MotionState",
    "SchedulerStatistics",
    "TrajectoryPoints",
    "make_scheduler",
]
