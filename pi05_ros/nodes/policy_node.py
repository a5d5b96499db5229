"""Node `policy`: camera frames, joint states and an instruction in, joint trajectories out.

In: `instruction`, `joint_states`, one image topic per camera. Out: commands per controller
(`<controller>/joint_trajectory`, or as `outputs` has it), `~/action_chunk`, `~/status`,
`~/active_instruction`, `/diagnostics`. Services: `~/stop`, `~/resume`.
`configure` loads and warms up the policy, `activate` starts motion, `deactivate` ends it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import traceback
from collections.abc import Callable, Sequence

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import Trigger

from pi05_ros import config as declared
from pi05_ros import types
from pi05_ros.config import (
    FaultParameters,
    GuidanceParameters,
    ParameterError,
    PolicyParameters,
    SchedulerParameters,
)
from pi05_ros.executor import ExecutorError, ExecutorState, InferenceExecutor
from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.assembly import (
    check_fit,
    decode_stored_image,
    get_ready_to_decode,
    load_policy,
    lower_priority,
)
from pi05_ros.nodes.diagnostics import Escalation
from pi05_ros.nodes.inputs import Inputs
from pi05_ros.nodes.messages import LATCHED_QOS
from pi05_ros.nodes.motion import Motion
from pi05_ros.nodes.outputs import make_output
from pi05_ros.nodes.parameters import declare, declare_named, unknown_overrides
from pi05_ros.nodes.policy_parts import policy_diagnostics
from pi05_ros.nodes.qos_watch import QosWatch
from pi05_ros.nodes.spinning import spin_until_interrupted
from pi05_ros.nodes.status import StatusTimes, policy_status
from pi05_ros.nodes.urdf_limits import limited
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.runner import PolicyRunner
from pi05_ros.runner.factory import make_runner
from pi05_ros.types import JointGroup

STOP_TIMEOUT_S = 5.0
"""A policy that is still busy then is left behind; its thread ends with the process."""


class PolicyNode(LifecycleNode):
    """Wires `PolicyRunner` to topics."""

    def __init__(self) -> None:
        super().__init__("policy")
        self.parameters = declare(self, PolicyParameters)
        self.scheduling = declare(self, SchedulerParameters, "scheduler.")
        self.faults = declare(self, FaultParameters, "faults.")
        self.limits = declared.LimitsParameters()
        self.phase = PolicyStatus.UNCONFIGURED
        self.policy: types.Policy | None = None
        self.joints: JointGroup | None = None
        self.inputs: Inputs | None = None
        self.qos = QosWatch(self)
        self.escalation = Escalation(self.faults.error_after_s)
        self.motion = Motion(self, self._on_fault)
        self.fault = ""
        self.stopped = False
        self._device_fault = False
        self._entities: list[Callable[[], object]] = []
        self._status_publisher = self.create_publisher(PolicyStatus, "~/status", 10)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._instruction_publisher = self.create_publisher(
            String, "~/active_instruction", LATCHED_QOS
        )
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/resume", self._on_resume)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._status_times = StatusTimes(self.parameters.status_rate_hz)
        # a clock of its own: with use_sim_time, the node must speak while /clock stands
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(self._status_times.look_period_s, self._on_status_timer, clock=steady)
        if self.parameters.autostart:
            self._autostart = self.create_timer(0.0, self._on_autostart, clock=steady)

    def close(self) -> None:
        """Brake the arms if they still move, and end the inference thread."""
        if self.phase == PolicyStatus.ACTIVE and rclpy.ok():
            self.trigger_deactivate()
        self._tear_down()

    @property
    def runner(self) -> PolicyRunner | None:
        """From configure to cleanup."""
        return self.motion.runner

    def now_s(self) -> float:
        return self.motion.now_s()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.fault = self.motion.last_failure = ""
        try:
            self._configure()
        except Exception as error:
            # rclpy swallows what a transition raises
            expected = isinstance(error, (ParameterError, ExecutorError, ValueError))
            self.get_logger().error(f"configure: {error if expected else traceback.format_exc()}")
            self._tear_down()
            return TransitionCallbackReturn.FAILURE
        self._enter(PolicyStatus.INACTIVE)
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.fault = ""
        self.motion.start()
        self._enter(PolicyStatus.ACTIVE)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.motion.end()
        if self._device_fault:
            return TransitionCallbackReturn.ERROR
        self._enter(PolicyStatus.INACTIVE)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._tear_down()
        self._enter(PolicyStatus.UNCONFIGURED)
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self.phase == PolicyStatus.ACTIVE:
            self.motion.end()
        self._tear_down()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._device_fault = False
        self._tear_down()
        self._enter(PolicyStatus.ERROR)
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        self.parameters = parameters = declare(self, PolicyParameters)
        self.scheduling = declare(self, SchedulerParameters, "scheduler.")
        self.faults = declare(self, FaultParameters, "faults.")
        self.escalation = Escalation(self.faults.error_after_s)
        guidance = declare(self, GuidanceParameters, "guidance.")
        cameras = declare_named(self, "cameras", declared.CameraParameters)
        joints = declared.joint_group(declare_named(self, "joints", declared.JointParameters))
        self.limits = declare(self, declared.LimitsParameters, "limits.")
        controllers = declare_named(self, "controllers", declared.ControllerParameters)
        columns = declared.controller_columns(controllers, joints)
        unknown = unknown_overrides(self)
        if unknown:
            raise ParameterError(
                f"unknown parameters {unknown}; docs/parameters.md lists those that there are"
            )
        self.joints = joints = limited(self, self.limits, joints)
        for name, own in columns.items():
            names = [joints.names[column] for column in own]
            output = make_output(self, name, controllers[name], names, own, self.qos)
            self.motion.outputs[name] = output
            self._entities.append(output.destroy)
        executor = InferenceExecutor(
            functools.partial(load_policy, parameters, guidance),
            on_thread_start=functools.partial(lower_priority, parameters.inference_nice),
            on_result=self.motion.something_arrived,
        )
        self._entities.append(lambda: self._stop_executor(executor))
        executor.start()
        self.policy = executor.wait_ready(parameters.load_timeout_s)
        check_fit(self.policy, joints, cameras)
        self.get_logger().info(f"warm: {self.policy.description}")
        get_ready_to_decode()
        runner = make_runner(
            parameters,
            self.scheduling,
            self.faults,
            cameras,
            joints,
            executor,
            decode_stored_image,
        )
        if self.stopped:
            runner.stop(self.now_s())
        self.motion.set_up(
            runner,
            joints.names,
            dry_run=parameters.dry_run,
            realtime_priority=parameters.realtime_priority,
        )
        self._entities.append(self.motion.tear_down)
        self.inputs = Inputs(
            self,
            runner.buffer,
            cameras,
            self.qos,
            self._on_instruction,
            self.motion.frame_arrived,
        )
        self._entities.append(self.inputs.destroy)
        if parameters.instruction:
            self._take_instruction(parameters.instruction)
        # what lives as long as the policy need not be looked through again and again
        gc.collect()
        gc.freeze()

    def _stop_executor(self, executor: InferenceExecutor) -> None:
        loads = executor.state is ExecutorState.STARTING
        hangs = self.runner is not None and self.runner.hung
        if not executor.stop(0.0 if loads or hangs else STOP_TIMEOUT_S):
            self.get_logger().error(
                "the policy does not return; its thread and memory are left behind, restart the "
                "process to be rid of them"
            )

    def _tear_down(self) -> None:
        while self._entities:
            self._entities.pop()()
        self.motion.outputs.clear()
        self.motion.runner = None
        self.qos.clear()
        self.policy, self.inputs = None, None
        gc.unfreeze()

    def _on_autostart(self) -> None:
        self._autostart.cancel()
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.stopped = True
        if self.runner is not None:
            with self.motion.lock:
                self.motion.brake(self.runner.stop(self.now_s()))
        self.get_logger().warning("stopped; ~/resume ends it")
        self.publish_status()
        response.success, response.message = True, "stopped; ~/resume ends it"
        return response

    def _on_resume(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.message = "resumed" if self.stopped else "was not stopped"
        self.stopped = False
        if self.runner is not None:
            with self.motion.lock:
                self.runner.resume()
        self.get_logger().info(response.message)
        self.publish_status()
        response.success = True
        return response

    def _on_instruction(self, message: String) -> None:
        self._take_instruction(message.data)
        self.publish_status()

    def _take_instruction(self, text: str) -> None:
        assert self.runner is not None
        try:
            with self.motion.lock:
                instruction = self.runner.set_instruction(text)
        except InstructionError as error:
            self.get_logger().warning(f"instruction refused: {error}")
            return
        self._instruction_publisher.publish(String(data=instruction))
        self.get_logger().info(f"instruction: {instruction!r}")

    def _on_fault(self) -> None:
        """Deactivate; after a device's fault by way of the error processing, which unloads."""
        fault = self.motion.fault
        if fault is None or self.phase != PolicyStatus.ACTIVE:
            return
        self.fault, self._device_fault = fault.message, fault.device
        self.get_logger().error(f"motion ends: {fault.message}")
        self.trigger_deactivate()

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
        except (ParameterError, TypeError, ValueError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        with self.motion.lock:
            if scheduling.speed_scale != self.scheduling.speed_scale:
                self.runner.set_speed(scheduling.speed_scale, self.now_s())
            if set(given) != {"speed_scale"}:
                self.runner.use_scheduler(scheduler)
        self.scheduling = scheduling
        self.get_logger().info(f"scheduler: {scheduling.method}, speed {scheduling.speed_scale:g}")
        return SetParametersResult(successful=True)

    def problems(self, now_s: float) -> list[str]:
        """Why no inference can start or no command goes out; one line each."""
        problems = [f"fault: {self.fault}"] if self.fault else []
        if self.runner is None or self.inputs is None:
            return [*problems, "not configured"]
        problems += self.runner.problems(now_s)
        problems += self.inputs.problems()
        problems += self.qos.problems()
        problems += [f"nobody listens to {topic}: is the controller running?"
                     for topic in self.motion.deaf_controllers()]  # fmt: skip
        return problems

    def _on_status_timer(self) -> None:
        if self._status_times.due(self.phase, self.problems(self.now_s())):
            self.publish_status()

    def publish_status(self) -> None:
        now_s = self.now_s()
        problems = self.problems(now_s)
        self._status_times.published(self.phase, problems)
        self._status_publisher.publish(policy_status(self, problems, now_s))
        self._diagnostics_publisher.publish(policy_diagnostics(self, problems, now_s))

    def _enter(self, phase: int) -> None:
        self.phase = phase
        self.publish_status()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the executable `policy_node`."""
    return spin_until_interrupted(PolicyNode, "policy", args)
