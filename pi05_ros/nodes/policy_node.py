"""Node `policy`: camera frames, joint states and an instruction in, joint trajectories out.

In: `instruction`, `joint_states`, one image topic per camera. Out: commands per controller
(`<controller>/joint_trajectory`, or as `outputs` has it), `~/action_chunk`, `~/status`,
`~/active_instruction`, `/diagnostics`.
`configure` loads and warms up the policy, `activate` starts motion, `deactivate` ends it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from pi05_ros import types
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.executor import ExecutorError, InferenceExecutor
from pi05_ros.msg import ActionChunk, PolicyStatus
from pi05_ros.nodes import parameters as declared
from pi05_ros.nodes.assembly import ImageType, check_fit, load_policy, make_runner
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    JOINT_QOS,
    LATCHED_QOS,
    chunk_message,
    serialized_stamp_s,
    to_seconds,
)
from pi05_ros.nodes.outputs import Output, make_output
from pi05_ros.nodes.parameters import (
    GuidanceParameters,
    ParameterError,
    PolicyParameters,
    SchedulerParameters,
    declare,
    declare_named,
)
from pi05_ros.nodes.spinning import spin_until_interrupted
from pi05_ros.nodes.status import policy_diagnostics, policy_status
from pi05_ros.observation.buffer import InstructionError
from pi05_ros.observation.decode import DecodeError, decode_joint_state
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import JointGroup

STOP_TIMEOUT_S = 5.0
"""A policy that is still busy then is left behind; its thread ends with the process."""
RATE_TICKS = 251
"""Ticks that the measured control rate is taken over."""
IMAGE_TYPES: dict[str, ImageType] = {"raw": Image, "compressed": CompressedImage}


class PolicyNode(LifecycleNode):
    """Wires `PolicyRunner` to topics."""

    def __init__(self) -> None:
        super().__init__("policy")
        self.parameters = declare(self, PolicyParameters)
        self.scheduling = declare(self, SchedulerParameters, "scheduler.")
        self.phase = PolicyStatus.UNCONFIGURED
        self.policy: types.Policy | None = None
        self.runner: PolicyRunner | None = None
        self.joints: JointGroup | None = None
        self.outputs: dict[str, Output] = {}
        self.jitter = LatencyTracker()
        self.ticks = 0
        self.trajectories = 0
        self.last_failure = ""
        self._tick_times_s: deque[float] = deque(maxlen=RATE_TICKS)
        self._entities: list[Callable[[], object]] = []
        self._status_publisher = self.create_publisher(PolicyStatus, "~/status", 10)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._instruction_publisher = self.create_publisher(
            String, "~/active_instruction", LATCHED_QOS
        )
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.create_timer(1.0 / self.parameters.status_rate_hz, self.publish_status)
        if self.parameters.autostart:
            self._autostart = self.create_timer(0.0, self._on_autostart)

    @property
    def tick_rate_hz(self) -> float:
        """Measured over the last ticks; 0 before the second one."""
        times_s = self._tick_times_s
        span_s = times_s[-1] - times_s[0] if len(times_s) > 1 else 0.0
        return (len(times_s) - 1) / span_s if span_s > 0 else 0.0

    def close(self) -> None:
        """Brake the arms if they still move, and end the inference thread."""
        if self.phase == PolicyStatus.ACTIVE and rclpy.ok():
            self.trigger_deactivate()
        self._tear_down()

    def now_s(self) -> float:
        return float(self.get_clock().now().nanoseconds * 1e-9)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self._configure()
        except (ParameterError, ExecutorError, ValueError) as error:
            self.get_logger().error(f"configure: {error}")
            self._tear_down()
            return TransitionCallbackReturn.FAILURE
        self._enter(PolicyStatus.INACTIVE)
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self.runner is not None
        self.runner.activate()
        self._tick_times_s.clear()
        self._tick_timer.reset()
        self._enter(PolicyStatus.ACTIVE)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self.runner is not None
        self._tick_timer.cancel()
        now_s = self.now_s()
        hold = self.runner.deactivate(now_s)
        if hold is not None and not self.parameters.dry_run:
            for output in self.outputs.values():
                self.trajectories += output.brake(hold, self.runner.stream, now_s)
        self._enter(PolicyStatus.INACTIVE)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._tear_down()
        self._enter(PolicyStatus.UNCONFIGURED)
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._tear_down()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._tear_down()
        self._enter(PolicyStatus.ERROR)
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        self.parameters = parameters = declare(self, PolicyParameters)
        self.scheduling = declare(self, SchedulerParameters, "scheduler.")
        guidance = declare(self, GuidanceParameters, "guidance.")
        cameras = declare_named(self, "cameras", declared.CameraParameters)
        self.joints = joints = declared.joint_group(
            declare_named(self, "joints", declared.JointParameters)
        )
        controllers = declare_named(self, "controllers", declared.ControllerParameters)
        columns = declared.controller_columns(controllers, joints)
        unknown = declared.unknown_overrides(self)
        if unknown:
            raise ParameterError(
                f"unknown parameters {unknown}; docs/parameters.md lists those that there are"
            )
        for name, own in columns.items():
            names = [joints.names[column] for column in own]
            self.outputs[name] = make_output(self, name, controllers[name], names, own)
            self._entities.append(self.outputs[name].destroy)
        executor = InferenceExecutor(functools.partial(load_policy, parameters, guidance))
        self._entities.append(lambda: executor.stop(STOP_TIMEOUT_S))
        executor.start()
        self.policy = executor.wait_ready(parameters.load_timeout_s)
        check_fit(self.policy, joints, cameras)
        self.get_logger().info(f"warm: {self.policy.description}")
        self.runner = make_runner(parameters, self.scheduling, cameras, joints, executor)
        self._connect(cameras)
        if parameters.instruction:
            self._take_instruction(parameters.instruction)

    def _connect(self, cameras: dict[str, declared.CameraParameters]) -> None:
        assert self.runner is not None
        for name, camera in cameras.items():
            topic = camera.topic or f"{name}/image_raw"
            image_type = IMAGE_TYPES[camera.transport]
            self._subscribe(
                image_type,
                topic if camera.transport == "raw" else f"{topic}/compressed",
                functools.partial(self._on_image, name, image_type),
                IMAGE_QOS,
                raw=True,  # stored as it came: a frame that no inference uses is never converted
            )
        self._subscribe(JointState, "joint_states", self._on_joint_state, JOINT_QOS)
        self._subscribe(String, "instruction", self._on_instruction, INSTRUCTION_QOS)
        self._chunk_publisher = self.create_publisher(ActionChunk, "~/action_chunk", 10)
        self._entities.append(lambda: self.destroy_publisher(self._chunk_publisher))
        self._tick_timer = self.create_timer(self.runner.stream.dt_s, self._on_tick)
        self._tick_timer.cancel()
        self._entities.append(lambda: self.destroy_timer(self._tick_timer))

    def _subscribe(self, message_type: type, topic: str, callback: Callable, qos: object,
                   raw: bool = False) -> None:  # fmt: skip
        subscription = self.create_subscription(message_type, topic, callback, qos, raw=raw)
        self._entities.append(lambda: self.destroy_subscription(subscription))

    def _tear_down(self) -> None:
        while self._entities:
            self._entities.pop()()
        self.outputs.clear()
        self.runner, self.policy = None, None

    def _on_autostart(self) -> None:
        self._autostart.cancel()
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def _on_image(self, camera: str, image_type: ImageType, data: bytes) -> None:
        assert self.runner is not None
        self.runner.buffer.put_image(camera, serialized_stamp_s(data), (image_type, data))

    def _on_joint_state(self, message: JointState) -> None:
        assert self.runner is not None and self.joints is not None
        try:
            positions = decode_joint_state(message, self.joints.names)
        except DecodeError as error:
            self.get_logger().warning(f"joint_states: {error}", throttle_duration_sec=1.0)
            return
        self.runner.buffer.put_joints(to_seconds(message.header.stamp), positions)

    def _on_instruction(self, message: String) -> None:
        self._take_instruction(message.data)
        self.publish_status()

    def _take_instruction(self, text: str) -> None:
        assert self.runner is not None
        try:
            instruction = self.runner.set_instruction(text)
        except InstructionError as error:
            self.get_logger().warning(f"instruction refused: {error}")
            return
        self._instruction_publisher.publish(String(data=instruction))
        self.get_logger().info(f"instruction: {instruction!r}")

    def _on_tick(self) -> None:
        assert self.runner is not None and self.joints is not None
        started_s = time.monotonic()
        if self._tick_times_s:
            interval_s = started_s - self._tick_times_s[-1]
            self.jitter.add(abs(interval_s - self.runner.stream.dt_s))
        self._tick_times_s.append(started_s)
        self.ticks += 1
        if self._deaf_controllers():
            self.runner.halt()
            return
        now_s = self.now_s()
        tick = self.runner.tick(now_s)
        for failure in tick.failures:
            self.last_failure = failure
            self.get_logger().warning(f"inference: {failure}", throttle_duration_sec=1.0)
        if not self.parameters.dry_run:
            for output in self.outputs.values():
                self.trajectories += output.send(tick.trajectory, self.runner.stream, now_s)
        for chunk, latency_s in tick.chunks:
            self._chunk_publisher.publish(chunk_message(chunk, self.joints.names, latency_s))

    def _deaf_controllers(self) -> list[str]:
        """Topics of controllers that nobody runs."""
        if self.parameters.dry_run:
            return []
        return [output.topic for output in self.outputs.values() if output.deaf]

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Take `scheduler.*` in motion; what else is set is read at the next configure."""
        prefix = "scheduler."
        given = {
            change.name.removeprefix(prefix): change.value
            for change in changes
            if change.name.startswith(prefix)
        }
        if not given or self.runner is None or self.joints is None:
            return SetParametersResult(successful=True)
        try:
            scheduling = dataclasses.replace(self.scheduling, **given)
            scheduler = scheduling.make(self.joints)
        except (ParameterError, TypeError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.scheduling = scheduling
        self.runner.use_scheduler(scheduler)
        self.runner.speed_scale = scheduling.speed_scale
        self.get_logger().info(f"scheduler: {scheduling.method}")
        return SetParametersResult(successful=True)

    def problems(self, now_s: float) -> list[str]:
        """Why no inference can start or no command goes out; one line each."""
        if self.runner is None:
            return ["not configured"]
        problems = self.runner.buffer.problems(now_s)
        problems += [f"nobody listens to {topic}: is the controller running?"
                     for topic in self._deaf_controllers()]  # fmt: skip
        return problems

    def publish_status(self) -> None:
        now_s = self.now_s()
        self._status_publisher.publish(policy_status(self, now_s))
        self._diagnostics_publisher.publish(policy_diagnostics(self, now_s))

    def _enter(self, phase: int) -> None:
        self.phase = phase
        self.publish_status()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the executable `policy_node`."""
    return spin_until_interrupted(PolicyNode, "policy", args)
