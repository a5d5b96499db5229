"""Node `policy`: camera frames, joint states and an instruction in, joint trajectories out.

In: `instruction`, `joint_states`, one image topic per camera. Out: commands per controller
(`<controller>/joint_trajectory`, or by `outputs`), `~/action_chunk`, `~/status`,
`~/active_instruction`, `/diagnostics`. Services: `~/stop`, `~/resume`.
`configure` loads and warms up the policy, `activate` starts motion, `deactivate` ends it.

Threads: rclpy's thread serves subscriptions, services, status and parameters; the transition thread
(`spinning.TransitionExecutor`) runs lifecycle transitions, so that a policy that loads delays
nothing else; the control thread commands; the executor's thread infers.
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
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import Trigger

from pi05_ros.config import FaultParameters, ParameterError, PolicyParameters, SchedulerParameters
from pi05_ros.executor import ExecutorError, ExecutorState, InferenceExecutor
from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes import EXIT_BAD_START, EXIT_DEVICE
from pi05_ros.nodes.assembly import (
    apply_limits,
    check_fit,
    load_policy,
    make_executor,
    usable_instruction,
    warm_up_decoder,
)
from pi05_ros.nodes.control_thread import ControlThread
from pi05_ros.nodes.graph_checks import ControllerCheck, QosMonitor, second_publishers
from pi05_ros.nodes.inputs import Inputs
from pi05_ros.nodes.messages import LATCHED_QOS, decode_stored_image
from pi05_ros.nodes.outputs import make_outputs
from pi05_ros.nodes.parameters import declare, declare_robot, whole_numbers_as_floats
from pi05_ros.nodes.spinning import leave_if_busy, spin_until_interrupted
from pi05_ros.nodes.status import Configured, Escalation, Snapshot, StatusPublisher
from pi05_ros.observation.buffer import History
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner_factory import make_runner
from pi05_ros.types import Level, Policy, Problem

STOP_TIMEOUT_S = 5.0
"""A policy that is still busy then is left behind; its thread ends with the process."""
EXIT_TIMEOUT_S = 0.2
"""The same when the process ends."""
REST_TIMEOUT_S = 10.0
"""How long a process that is about to end waits for its arms to rest."""
SCHEDULER = "scheduler."


class PolicyNode(LifecycleNodeMixin, Node):
    """Lifecycle, services and parameters around a `PolicyRunner`."""

    def __init__(self) -> None:
        Node.__init__(self, "policy")
        # transitions run on another thread, and queries of the state do not wait for them
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.exit_code: int | None = None
        """Set when the process must end."""
        self._policy_parameters = declare(self, PolicyParameters)
        self._scheduling = declare(self, SchedulerParameters, SCHEDULER)
        declare(self, FaultParameters, "faults.")
        self._phase = PolicyStatus.UNCONFIGURED
        self._fault = ""
        self._stopped = self._configuring = self._closing = self._device_fault = False
        self._parts_lock = threading.RLock()
        """Held on rclpy's thread while it reads `_configured`, `_stopped` and the outputs for a
        status or a service, and on the transition thread while it exchanges them. Taken before
        `ControlThread.lock` where both are held."""
        self._configured: Configured | None = None
        self._executor: InferenceExecutor | None = None
        self._destroy: list[Callable[[], object]] = []
        """Undoes `configure`, last entry first."""
        self._qos = QosMonitor(self)
        self._controller_check = ControllerCheck(self)
        self._control = ControlThread(self, self._on_fault)
        self._status = StatusPublisher(self, self._policy_parameters.status_rate_hz)
        self._instructions = self.create_publisher(String, "~/active_instruction", LATCHED_QOS)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/resume", self._on_resume)
        self.add_pre_set_parameters_callback(functools.partial(whole_numbers_as_floats, self))
        self.add_on_set_parameters_callback(self._on_set_parameters)
        # not the node's clock: with use_sim_time, status is published while /clock pauses
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(self._status.check_period_s, self._on_status_timer, clock=steady)
        self._autostart = None
        if self._policy_parameters.autostart:
            group = ReentrantCallbackGroup()
            self._autostart = self.create_timer(0.0, self._on_autostart, group, clock=steady)

    # Called by spinning.py

    def is_transition(self, entity: Any) -> bool:
        """Whether the callback of `entity` makes a lifecycle transition, which may take minutes."""
        return (
            entity is self._autostart
            or entity is self._control.fault_condition
            or getattr(entity, "srv_type", None) is ChangeState
        )

    def brake(self) -> None:
        """Bring the arms to rest, because the process is about to end; on the signal thread."""
        self._closing = True
        if not self._control.stop(until_rest_s=REST_TIMEOUT_S):
            self.get_logger().error("the arms may still move: use the emergency stop")

    def close(self) -> None:
        """Brake the arms if they still move, and end the inference thread."""
        self._closing = True
        if self._phase == PolicyStatus.ACTIVE:
            if rclpy.ok():
                self.trigger_deactivate()
            else:
                self._control.end()
        self._tear_down()

    # Lifecycle, on the transition thread

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._fault = self._control.last_failure = ""
        self._configuring = True
        self.publish_status()
        try:
            self._configure()
        except Exception as error:
            if self._executor is not None and self._executor.device_lost:
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
        self._fault = ""
        self._control.start()
        self._enter(PolicyStatus.ACTIVE)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._control.end()
        if self._device_fault:
            return TransitionCallbackReturn.ERROR
        self._enter(PolicyStatus.INACTIVE)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._unload(PolicyStatus.UNCONFIGURED)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._phase == PolicyStatus.ACTIVE:
            self._control.end()
        return self._unload(PolicyStatus.FINALIZED)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._device_fault = False
        return self._unload(PolicyStatus.ERROR)

    def _unload(self, phase: int) -> TransitionCallbackReturn:
        self._tear_down()
        if phase != PolicyStatus.ERROR:
            self._instructions.publish(String())
        self._enter(phase)
        return TransitionCallbackReturn.SUCCESS

    def _on_autostart(self) -> None:
        assert self._autostart is not None
        self._autostart.cancel()
        if self.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            # a process that starts its motion by itself is useless without a configured node
            self.exit_code = self.exit_code or EXIT_BAD_START
        elif not self._closing:
            self.trigger_activate()

    def _on_fault(self) -> None:
        """Deactivate; a device fault leads to the error processing, which unloads the policy."""
        fault = self._control.fault
        if fault is None or self._phase != PolicyStatus.ACTIVE:
            return
        self._fault, self._device_fault = fault.message, fault.device
        self.get_logger().error(f"motion ends: {fault.message}")
        if fault.sticky:
            self.get_logger().error(
                "the device is lost for this process, which ends; the launch file starts another"
            )
            self.exit_code = EXIT_DEVICE
            return
        self.trigger_deactivate()

    def _configure(self) -> None:
        self._executor = None
        robot = declare_robot(self)
        self._policy_parameters, self._scheduling = robot.parameters, robot.scheduler
        joints = apply_limits(self, robot.limits, robot.joints)
        robot = dataclasses.replace(robot, joints=joints)
        for name, output in make_outputs(self, robot, self._qos):
            self._control.outputs[name] = output
            self._destroy.append(output.destroy)
        load = functools.partial(load_policy, robot.parameters, robot.guidance)
        executor = make_executor(robot.parameters, robot.scheduler, load, self._control.notify)
        self._executor = executor
        hang_timeout_s = robot.faults.hang_timeout_s
        self._destroy.append(functools.partial(self._stop_executor, executor, hang_timeout_s))
        executor.start()
        policy = executor.wait_ready(robot.parameters.load_timeout_s)
        for notice in check_fit(policy, joints, robot.cameras):
            self.get_logger().warning(notice)
        self.get_logger().info(f"warm: {policy.description}")
        warm_up_decoder()
        self._connect(robot, policy, executor)
        if robot.parameters.instruction:
            self._take_instruction(robot.parameters.instruction)
        # objects that live as long as the policy are left out of garbage collections
        gc.collect()
        gc.freeze()

    def _connect(self, robot: RobotConfig, policy: Policy, executor: InferenceExecutor) -> None:
        """Create the runner and the subscriptions, and give the runner to the control thread."""
        runner = make_runner(robot, executor, decode_stored_image, history=History.of(policy))
        with self._parts_lock:
            if self._stopped:
                runner.stop(self._control.now_s())
            self._control.set_up(
                runner,
                robot.joints.names,
                dry_run=robot.parameters.dry_run,
                realtime_priority=robot.parameters.realtime_priority,
            )
            # no motion before the first status timer has read the graph
            text = "controllers: the graph is not read yet"
            self._control.conflicts = [Problem("controllers", text, Level.ERROR)]
            self._destroy.append(self._control.tear_down)
            cameras, on_frame = robot.cameras, self._control.frame_arrived
            buffer, on_instruction = runner.buffer, self._on_instruction
            inputs = Inputs(self, buffer, cameras, self._qos, on_instruction, on_frame)
            self._destroy.append(inputs.destroy)
            escalation = Escalation(robot.faults.error_after_s)
            self._configured = Configured(policy, robot, runner, inputs, escalation)

    def _stop_executor(self, executor: InferenceExecutor, hang_timeout_s: float) -> None:
        """End the executor's thread; does not wait for a load or a hang."""
        timeout_s = EXIT_TIMEOUT_S if self._closing else STOP_TIMEOUT_S
        busy_since_s = executor.busy_since_s
        hangs = busy_since_s is not None and time.monotonic() - busy_since_s > hang_timeout_s
        if hangs or executor.state is ExecutorState.STARTING:
            timeout_s = 0.0
        if not executor.stop(timeout_s) and not self._closing:
            self.get_logger().error(
                "the policy does not return; its thread and memory are left behind, restart the "
                "process to free them"
            )

    def _tear_down(self) -> None:
        with self._parts_lock:
            self._configured = self._control.runner = None
            self._control.outputs.clear()
            self._control.conflicts = ()
            self._controller_check.clear()
        while self._destroy:
            self._destroy.pop()()
        self._qos.clear()
        gc.unfreeze()

    # Services, instruction and parameters, on rclpy's thread

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._parts_lock:
            self._stopped = True
        response.success, response.message = True, "stopped; ~/resume ends it"
        if not self._control.stop():
            response.success = False
            response.message = "the control thread does not answer: use the emergency stop"
        self.get_logger().warning(response.message)
        self.publish_status()
        return response

    def _on_resume(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._parts_lock, self._control.lock:
            runner = self._control.runner
            was_stopped = self._stopped or (runner is not None and runner.stopped)
            self._stopped = False
            if runner is not None:
                runner.resume()
        response.message = "resumed" if was_stopped else "was not stopped"
        self.get_logger().info(response.message)
        self.publish_status()
        response.success = True
        return response

    def _on_instruction(self, text: str) -> None:
        self._take_instruction(text)
        self.publish_status()

    def _take_instruction(self, text: str) -> None:
        configured = self._configured
        if configured is None:
            return  # the transition thread destroys the subscription that this message came by
        try:
            limit = self._policy_parameters.max_instruction_chars
            instruction = usable_instruction(configured.policy, text, limit)
            with self._control.lock:
                configured.runner.set_instruction(instruction)
        except ValueError as error:
            self.get_logger().warning(f"instruction refused: {error}")
            return
        self._instructions.publish(String(data=instruction))
        self.get_logger().info(f"instruction: {instruction!r}")

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Apply `scheduler.*` in motion; refuse all others while configured."""
        configured = self._configured
        late = ", ".join(sorted(change.name for change in changes if self._is_late(change.name)))
        if late and (configured is not None or self._configuring):
            return SetParametersResult(
                successful=False,
                reason=f"{late}: read at the next configure; deactivate and clean up the node, set "
                "it, and configure again",
            )
        scheduled = [change for change in changes if change.name.startswith(SCHEDULER)]
        given = {change.name.removeprefix(SCHEDULER): change.value for change in scheduled}
        if not given or configured is None:
            return SetParametersResult(successful=True)
        try:
            scheduling = dataclasses.replace(self._scheduling, **given)
            scheduler = scheduling.make(configured.robot.joints)
        except (ParameterError, TypeError, ValueError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        with self._control.lock:
            if scheduling.speed_scale != self._scheduling.speed_scale:
                configured.runner.set_speed(scheduling.speed_scale, self._control.now_s())
            if set(given) != {"speed_scale"}:
                configured.runner.use_scheduler(scheduler)
        self._scheduling = scheduling
        self.get_logger().info(f"scheduler: {scheduling.method}, speed {scheduling.speed_scale:g}")
        return SetParametersResult(successful=True)

    def _is_late(self, name: str) -> bool:
        """Whether a change of the parameter has no effect before the next configure."""
        if not self.has_parameter(name):
            return False  # it is being declared
        if name == "use_sim_time":
            return self._phase == PolicyStatus.ACTIVE
        return name == "scheduler.smoothing_hz" or not name.startswith(SCHEDULER)

    # Status, on rclpy's thread and, after a transition, on its thread

    def _on_status_timer(self) -> None:
        with self._parts_lock:
            if self._configured is not None:
                outputs = list(self._control.outputs.values())
                topics = ["joint_states", *(output.topic for output in outputs)]
                controllers = [c for o in outputs if not o.direct for c in o.controllers]
                self._control.conflicts = [
                    *second_publishers(self, topics),
                    *self._controller_check.problems(controllers),
                ]
            due = self._status.due(self._phase, self._problems(self._control.now_s()))
        if due:
            self.publish_status()

    def _problems(self, now_s: float) -> list[Problem]:
        """Why no inference can start or no command goes out."""
        problems = []
        if self._fault:
            problems.append(Problem("fault", f"fault: {self._fault}", Level.ERROR))
        if self._configured is None:
            text = "loading: configure runs" if self._configuring else "not configured"
            return [*problems, Problem("node", text)]
        with self._control.lock:
            problems += self._configured.runner.problems(now_s)
        problems += self._configured.inputs.problems()
        problems += self._qos.problems()
        problems += self._control.problems()
        return problems

    def publish_status(self) -> None:
        """Publish ~/status and /diagnostics now."""
        with self._parts_lock:
            now_s = self._control.now_s()
            state = (now_s, self._phase, self._problems(now_s), self._fault, self._stopped)
            settings = (self._policy_parameters, self._scheduling.method)
            self._status.publish(Snapshot(*state, *settings, self._control, self._configured))

    def _enter(self, phase: int) -> None:
        self._phase = phase
        self.publish_status()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the executable `policy_node`."""
    return leave_if_busy(spin_until_interrupted(PolicyNode, "policy", args))
