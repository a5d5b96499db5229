"""The node's runner for evaluations: the same factory, parameters and limits, a simulated clock."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

from pi05_ros.config import SchedulerParameters
from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.evaluation.robot_config import RobotConfig
from pi05_ros.evaluation.simulated_time import SimulatedExecutor
from pi05_ros.executor import InferenceExecutor
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.runner.factory import make_runner
from pi05_ros.types import ImageArray


def evaluation_runner(
    robot: RobotConfig,
    scheduling: SchedulerParameters,
    cameras: Collection[str],
    executor: SimulatedExecutor,
    decode_image: Callable[[Any], ImageArray],
    prove_starts: bool = True,
) -> PolicyRunner:
    """The runner that the node would make of a params file.

    Args:
        robot: the params file.
        scheduling: its scheduler parameters, or a variant of them.
        cameras: names of those that the policy has; the file's others are left out.
        executor: stands in for the node's.
        decode_image: a stored picture → RGB [height, width, 3].
        prove_starts: see `make_runner`.

    Raises:
        RobotConfigError: the limits are a URDF's, and none was given.
    """
    robot.check_limits()
    executor.hang_timeout_s = robot.faults.hang_timeout_s
    return make_runner(
        robot.parameters,
        scheduling,
        robot.faults,
        {name: camera for name, camera in robot.cameras.items() if name in cameras},
        robot.joints,
        # the runner uses state, busy_since_s, failure, submit, results and discard of it
        cast("InferenceExecutor", executor),
        decode_image,
        prove_starts,
    )


def sent_trajectory(runner: PolicyRunner, tick: Tick, now_s: float) -> TrajectoryPoints | None:
    """What the node sends to the controllers after a tick; a fault deactivates and brakes."""
    braking = tick.braking
    if tick.fault is not None:
        braking = runner.deactivate(now_s)
    return tick.trajectory if braking is None else braking.trajectory
