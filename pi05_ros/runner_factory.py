"""Builds the runner from parameters, for the node and for both evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.speed import LowPassFilter, StartRamp
from pi05_ros.control.start_check import StartCheck
from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.control.trajectory import CommandStream
from pi05_ros.executor import InferenceExecutor
from pi05_ros.observation.buffer import CameraStream, History, ObservationBuffer
from pi05_ros.observation.stream import ImageRules
from pi05_ros.requests import Watchdog
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import ImageArray


def make_runner(
    robot: RobotConfig,
    executor: InferenceExecutor,
    decode_image: Callable[[Any], ImageArray],
    prove_starts: bool = True,
    history: History | None = None,
) -> PolicyRunner:
    """Build the runner that the parameters describe.

    Args:
        robot: the params file.
        executor: runs the policy.
        decode_image: as in `PolicyRunner`.
        prove_starts: False starts at any joint state, for a replay of a recording.
        history: earlier observations that the policy needs.
    """
    parameters, scheduling, faults, joints = (
        robot.parameters, robot.scheduler, robot.faults, robot.joints,
    )  # fmt: skip
    image_rules = ImageRules(
        faults.frozen_image_s, faults.refuse_one_colour, unusable_after_s=faults.error_after_s
    )
    buffer = ObservationBuffer(
        [CameraStream(name, camera.required) for name, camera in robot.cameras.items()],
        joints.names,
        replace(robot.gates, images=image_rules),
        history,
    )
    stream = CommandStream(
        MotionLimiter(joints, robot.dt_s, position_margin=parameters.position_margin),
        lookahead_steps=max(1, round(parameters.lookahead_s / robot.dt_s)),
        lead_s=parameters.lead_s,
    )
    low_pass = start_check = None
    if scheduling.smoothing_hz > 0:
        low_pass = LowPassFilter(scheduling.smoothing_hz, joints.gripper)
    if prove_starts:
        # A dry run may watch an arm that moves by itself, or a bag.
        standing = not parameters.dry_run
        start_check = StartCheck(
            joints, faults.start_states, faults.start_tolerance, standing=standing
        )
    # Nothing follows the commands of a dry run.
    tracking_time_s = 0.0 if parameters.dry_run else faults.tracking_time_s
    return PolicyRunner(
        buffer,
        executor,
        scheduling.make(joints),
        stream,
        joints,
        decode_image,
        low_pass=low_pass,
        start_ramp=StartRamp(
            joints, faults.first_command, faults.first_command_distance, faults.first_command_speed
        ),
        start_check=start_check,
        tracking=TrackingMonitor(joints, tracking_time_s, parameters.max_joint_age_s),
        watchdog=Watchdog(faults.hang_timeout_s, faults.max_failures),
        speed_scale=scheduling.speed_scale,
        speed_ramp_s=faults.speed_ramp_s,
        blend_instructions=faults.new_instruction == "blend",
        on_change=parameters.publish == "on_change",
    )
