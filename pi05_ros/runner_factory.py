"""Builds the runner from parameters, for the node and for both evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pi05_ros.config import CameraParameters, FaultParameters, PolicyParameters, SchedulerParameters
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.speed import LowPassFilter, StartRamp
from pi05_ros.control.start_check import StartCheck
from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.control.trajectory import CommandStream
from pi05_ros.executor import InferenceExecutor
from pi05_ros.observation.buffer import CameraStream, Gates, ObservationBuffer
from pi05_ros.observation.image_watch import ImageRules
from pi05_ros.requests import Watchdog
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import ImageArray, JointGroup


def make_runner(
    parameters: PolicyParameters,
    scheduling: SchedulerParameters,
    faults: FaultParameters,
    cameras: Mapping[str, CameraParameters],
    joints: JointGroup,
    executor: InferenceExecutor,
    decode_image: Callable[[Any], ImageArray],
    prove_starts: bool = True,
) -> PolicyRunner:
    """Build the runner that the parameters describe.

    Args:
        parameters, scheduling, faults, cameras, joints, executor: of the params file.
        decode_image: as in `PolicyRunner`.
        prove_starts: False starts at any joint state, for a replay of a recording.
    """
    dt_s = 1.0 / parameters.control_rate_hz
    buffer = ObservationBuffer(
        [CameraStream(name, camera.required) for name, camera in cameras.items()],
        joints.names,
        Gates(
            max_image_age_s=parameters.max_image_age_s,
            max_skew_s=parameters.max_skew_s,
            max_joint_age_s=parameters.max_joint_age_s,
            max_instruction_chars=parameters.max_instruction_chars,
            images=ImageRules(
                frozen_after_s=faults.frozen_image_s,
                refuse_one_colour=faults.refuse_one_colour,
                unusable_after_s=faults.error_after_s,
            ),
        ),
    )
    stream = CommandStream(
        MotionLimiter(joints, dt_s, position_margin=parameters.position_margin),
        lookahead_steps=max(1, round(parameters.lookahead_s / dt_s)),
        lead_s=parameters.lead_s,
    )
    low_pass = None
    if scheduling.smoothing_hz > 0:
        low_pass = LowPassFilter(scheduling.smoothing_hz, joints.gripper)
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
        start_check=StartCheck(
            joints,
            faults.start_states,
            faults.start_tolerance,
            # A dry run may watch an arm that moves by itself, or a bag.
            standing=not parameters.dry_run,
        )
        if prove_starts
        else None,
        tracking=TrackingMonitor(
            joints,
            # Nothing follows the commands of a dry run.
            0.0 if parameters.dry_run else faults.tracking_time_s,
            parameters.max_joint_age_s,
        ),
        watchdog=Watchdog(faults.hang_timeout_s, faults.max_failures),
        speed_scale=scheduling.speed_scale,
        speed_ramp_s=faults.speed_ramp_s,
        blend_instructions=faults.new_instruction == "blend",
        on_change=parameters.publish == "on_change",
    )
