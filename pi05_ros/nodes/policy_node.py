"""Node `policy`: camera frames, joint states and an instruction in, joint trajectories out.

In: `instruction`, `joint_states`, one image topic per camera. Out: commands per controller
(`<controller>/joint_trajectory`, or as `outputs` has it), `~/action_chunk`, `~/status`,
`~/active_instruction`, `/diagnostics`. Services: `~/stop`, `~/resume`.
`configure` loads and warms up the policy, `activate` starts motion, `deactivate` ends it.

Lifecycle transitions run on a thread of their own (`spinning.TransitionExecutor`): services, status
and subscriptions answer on rclpy's thread while a policy loads. The control thread commands.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
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
    limited,
    load_policy,
    make_executor,
    usable_instruction,
)
from pi05_ros.nodes.control_thread import ControlThread
from pi05_ros.nodes.controller_check import ControllerCheck
from pi05_ros.nodes.graph_watch import PublisherWatch, QosWatch
from pi05_ros.nodes.inputs import Inputs
from pi05_ros.nodes.messages import LATCHED_QOS
from pi05_ros.nodes.outputs import make_output
from pi05_ros.nodes.parameters import declare, declare_named, unknown_overrides
from pi05_ros.nodes.spinning import leave_if_busy, spin_until_interrupted
from pi05_ros.nodes.status import Escalation, StatusTimes, policy_diagnostics, policy_status
from pi05_ros.runner import PolicyRunner
from pi05_ros.runner_factory import make_runner
from pi05_ros.types import JointGroup

STOP_TIMEOUT_S = 5.0
"""A policy that is still busy then is left behind; its thread ends with the process."""
EXIT_TIMEOUT_S = 0.2
"""The same when the process ends."""
REST_TIMEOUT_S = 10.0
"""How long a process that is about to end waits for its arms to rest."""
EXIT_BAD_START = 2
EXIT_DEVICE = 70
"""A device error that only a new process recovers from; the launch file starts one."""
AT_CONFIGURE = ("scheduler.smoothing_hz",)
"""Of the parameters `scheduler.*`, those that do not change in motion."""


class PolicyNode(LifecycleNodeMixin, Node):
    """Wires `PolicyRunner` to topics."""

    def __init__(self) -> None:
        Node.__init__(self, "policy")
        # transitions run on another thread: a query of the state must not wait for one
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
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
        self.control = ControlThread(self, self._on_fault)
        self.fault = ""
        self.stopped = False
        self.exit_code: int | None = None
        """Set when the process must end."""
        self._publisher_watch = PublisherWatch(self)
        self._controller_check = ControllerCheck(self)
        self._parts_lock = threading.RLock()
        """Held while status is made, and while a transition exchanges what status reads."""
        self._configuring = self._closing = False
        self._executor: InferenceExecutor | None = None
        self._device_fault = False
        self._entities: list[Callable[[], object]] = []
        self._status_publisher = self.create_publisher(PolicyStatus, "~/status", 10)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._instruction_publisher = self.create_publisher(
            String, "~/active_instruction", LATCHED_QOS
        )
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/resume", self._on_resume)
        self.add_pre_set_parameters_callback(self._whole_numbers_as_floats)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._status_times = StatusTimes(self.parameters.status_rate_hz)
        # a clock of its own: with use_sim_time, the node must speak while /clock stands
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(self._status_times.look_period_s, self._on_status_timer, clock=steady)
        self._autostart = None
        if self.parameters.autostart:
            group = ReentrantCallbackGroup()
            self._autostart = self.create_timer(0.0, self._on_autostart, group, clock=steady)

    def is_transition(self, entity: Any) -> bool:
        """Whether the callback of `entity` makes a lifecycle transition, which may take minutes."""
        return (
            entity is self._autostart
            or entity is self.control.fault_condition
            or getattr(entity, "srv_type", None) is ChangeState
        )

    def brake(self) -> None:
        """Bring the arms to rest for good: the process is about to end. From any thread."""
        self._closing = True
        if not self.control.stop(until_rest_s=REST_TIMEOUT_S):
            self.get_logger().error("the arms may still move: use the emergency stop")

    def close(self) -> None:
        """Brake the arms if they still move, and end the inference thread."""
        self._closing = True
        if self.phase == PolicyStatus.ACTIVE:
            if rclpy.ok():
                self.trigger_deactivate()
            else:
                self.control.end()
        self._tear_down()

    @property
    def runner(self) -> PolicyRunner | None:
        """From configure to cleanup."""
        return self.control.runner

    def now_s(self) -> float:
        return self.control.now_s()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.fault = self.control.last_failure = ""
        self._configuring = True
        self.publish_status()
        try:
            self._configure()
        except Exception as error:
            executor = self._executor
            if executor is not None and executor.device_lost:
                self.exit_code = EXIT_DEVICE
            # rclpy swallows what a transition raises
            expected = isinstance(error, (ParameterError, ExecutorError, ValueError))
            self.get_logger().error(f"configure: {error if expected else traceback.format_exc()}")
            self._tear_down()
            return TransitionCallbackReturn.FAILURE
        finally:
            self._configuring = False
        self._enter(PolicyStatus.INACTIVE)
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._closing:
            return TransitionCallbackReturn.FAILURE
        self.fault = ""
        self.control.start()
        self._enter(PolicyStatus.ACTIVE)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.control.end()
        if self._device_fault:
            return TransitionCallbackReturn.ERROR
        self._enter(PolicyStatus.INACTIVE)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._tear_down()
        self._instruction_publisher.publish(String())
        self._enter(PolicyStatus.UNCONFIGURED)
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self.phase == PolicyStatus.ACTIVE:
            self.control.end()
        self._tear_down()
        self._instruction_publisher.publish(String())
        self._enter(PolicyStatus.FINALIZED)
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._device_fault = False
        self._tear_down()
        self._enter(PolicyStatus.ERROR)
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        self._executor = None
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
        joints = limited(self, self.limits, joints)
        for name, own in columns.items():
            names = [joints.names[column] for column in own]
            output = make_output(self, name, controllers[name], names, own, self.qos)
            self.control.outputs[name] = output
            self._entities.append(output.destroy)
            if controllers[name].output == "forward_velocity":
                self.get_logger().warning(
                    f"controller {name!r} takes velocities and keeps the last one for ever: if "
                    "this process is killed in motion, the arm runs on. Set a command timeout in "
                    "the controller or the driver, or use joint_trajectory (docs/reliability.md)"
                )
        executor = make_executor(
            parameters,
            self.scheduling,
            functools.partial(load_policy, parameters, guidance),
            self.control.notify,
        )
        self._executor = executor
        self._entities.append(lambda: self._stop_executor(executor))
        executor.start()
        policy = executor.wait_ready(parameters.load_timeout_s)
        for notice in check_fit(policy, joints, cameras):
            self.get_logger().warning(notice)
        self.get_logger().info(f"warm: {policy.description}")
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
        with self._parts_lock:
            if self.stopped:
                runner.stop(self.now_s())
            self.joints, self.policy = joints, policy
            self.control.set_up(
                runner,
                joints.names,
                dry_run=parameters.dry_run,
                realtime_priority=parameters.realtime_priority,
            )
            self.control.conflicts = ["controllers: the graph is not read yet"]
            self._entities.append(self.control.tear_down)
            self.inputs = Inputs(
                self,
                runner.buffer,
                cameras,
                self.qos,
                self._on_instruction,
                self.control.frame_arrived,
            )
            self._entities.append(self.inputs.destroy)
        if parameters.instruction:
            self._take_instruction(parameters.instruction)
        # what lives as long as the policy need not be looked through again and again
        gc.collect()
        gc.freeze()

    def _stop_executor(self, executor: InferenceExecutor) -> None:
        loads = executor.state is ExecutorState.STARTING
        busy_since_s = executor.busy_since_s
        hangs = (
            busy_since_s is not None
            and time.monotonic() - busy_since_s > self.faults.hang_timeout_s
        )
        timeout_s = EXIT_TIMEOUT_S if self._closing else STOP_TIMEOUT_S
        if not executor.stop(0.0 if loads or hangs else timeout_s) and not self._closing:
            self.get_logger().error(
                "the policy does not return; its thread and memory are left behind, restart the "
                "process to be rid of them"
            )

    def _tear_down(self) -> None:
        with self._parts_lock:
            self.policy, self.inputs, self.control.runner = None, None, None
            self.control.outputs.clear()
            self.control.conflicts = ()
            self._controller_check.clear()
        while self._entities:
            self._entities.pop()()
        self.qos.clear()
        gc.unfreeze()

    def _on_autostart(self) -> None:
        assert self._autostart is not None
        self._autostart.cancel()
        if self.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            # a process that was started to run at once has nothing left to do
            self.exit_code = self.exit_code or EXIT_BAD_START
        elif not self._closing:
            self.trigger_activate()

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._parts_lock:
            self.stopped = True
        response.success, response.message = True, "stopped; ~/resume ends it"
        if not self.control.stop():
            response.success = False
            response.message = "the control thread does not answer: use the emergency stop"
        self.get_logger().warning(response.message)
        self.publish_status()
        return response

    def _on_resume(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._parts_lock, self.control.lock:
            runner = self.runner
            was_stopped = self.stopped or (runner is not None and runner.stopped)
            self.stopped = False
            if runner is not None:
                runner.resume()
        response.message = "resumed" if was_stopped else "was not stopped"
        self.get_logger().info(response.message)
        self.publish_status()
        response.success = True
        return response

    def _on_instruction(self, message: String) -> None:
        self._take_instruction(message.data)
        self.publish_status()

    def _take_instruction(self, text: str) -> None:
        runner = self.runner
        if runner is None:
            return  # a message that was taken before the subscription was destroyed
        try:
            limit = self.parameters.max_instruction_chars
            instruction = usable_instruction(self.policy, text, limit)
            with self.control.lock:
                runner.set_instruction(instruction)
        except ValueError as error:
            self.get_logger().warning(f"instruction refused: {error}")
            return
        self._instruction_publisher.publish(String(data=instruction))
        self.get_logger().info(f"instruction: {instruction!r}")

    def _on_fault(self) -> None:
        """Deactivate; after a device's fault by way of the error processing, which unloads."""
        fault = self.control.fault
        if fault is None or self.phase != PolicyStatus.ACTIVE:
            return
        self.fault, self._device_fault = fault.message, fault.device
        self.get_logger().error(f"motion ends: {fault.message}")
        if fault.sticky:
            self.get_logger().error(
                "the device is lost for this process, which ends; the launch file starts another"
            )
            self.exit_code = EXIT_DEVICE
            return
        self.trigger_deactivate()

    def _whole_numbers_as_floats(self, changes: list[Parameter]) -> list[Parameter]:
        """`ros2 param set` reads 0 as an integer; a parameter with decimals takes it."""
        return [
            Parameter(change.name, Parameter.Type.DOUBLE, float(change.value))
            if change.type_ is Parameter.Type.INTEGER
            and self.has_parameter(change.name)
            and self.get_parameter(change.name).type_ is Parameter.Type.DOUBLE
            else change
            for change in changes
        ]

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Apply `scheduler.*` in motion; refuse what is read at configure while configured."""
        prefix = "scheduler."
        given = {
            change.name.removeprefix(prefix): change.value
            for change in changes
            if change.name.startswith(prefix)
        }
        # a declaration comes here too, before there is such a parameter
        late = sorted(
            change.name
            for change in changes
            if self.has_parameter(change.name)
            if change.name in AT_CONFIGURE
            or (change.name == "use_sim_time" and self.phase == PolicyStatus.ACTIVE)
            or not change.name.startswith((prefix, "use_sim_time"))
        )
        runner, joints = self.runner, self.joints
        if late and (runner is not None or self._configuring):
            return SetParametersResult(
                successful=False,
                reason=f"{', '.join(late)}: read at the next configure; deactivate and clean up "
                "the node, set it, and configure again",
            )
        if not given or runner is None or joints is None:
            return SetParametersResult(successful=True)
        try:
            scheduling = dataclasses.replace(self.scheduling, **given)
            scheduler = scheduling.make(joints)
        except (ParameterError, TypeError, ValueError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        with self.control.lock:
            if scheduling.speed_scale != self.scheduling.speed_scale:
                runner.set_speed(scheduling.speed_scale, self.now_s())
            if set(given) != {"speed_scale"}:
                runner.use_scheduler(scheduler)
        self.scheduling = scheduling
        self.get_logger().info(f"scheduler: {scheduling.method}, speed {scheduling.speed_scale:g}")
        return SetParametersResult(successful=True)

    def problems(self, now_s: float) -> list[str]:
        """Why no inference can start or no command goes out; one line each."""
        problems = [f"fault: {self.fault}"] if self.fault else []
        runner = self.runner
        if runner is None or self.inputs is None:
            return [*problems, "loading: configure runs" if self._configuring else "not configured"]
        with self.control.lock:
            problems += runner.problems(now_s)
        problems += self.inputs.problems()
        problems += self.qos.problems()
        problems += self.control.conflicts
        problems += [
            f"controllers: no controller subscribes to {output.topic} (subscribers: "
            f"{', '.join(output.subscriber_names) or 'none'}); start it"
            for output in self.control.without_subscriber()
        ]
        return problems

    def _on_status_timer(self) -> None:
        with self._parts_lock:
            if self.runner is not None:
                outputs = self.control.outputs.values()
                topics = [output.topic for output in outputs]
                self.control.conflicts = [
                    *self._publisher_watch.conflicts(topics, "joint_states"),
                    *self._controller_check.problems(outputs),
                ]
            due = self._status_times.due(self.phase, self.problems(self.now_s()))
        if due:
            self.publish_status()

    def publish_status(self) -> None:
        with self._parts_lock:
            now_s = self.now_s()
            problems = self.problems(now_s)
            self._status_times.published(self.phase, problems)
            with self.control.lock:
                status = policy_status(self, problems, now_s)
                diagnostics = policy_diagnostics(self, problems, now_s)
        self._status_publisher.publish(status)
        self._diagnostics_publisher.publish(diagnostics)

    def _enter(self, phase: int) -> None:
        self.phase = phase
        self.publish_status()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the executable `policy_node`."""
    return leave_if_busy(spin_until_interrupted(PolicyNode, "policy", args))
