"""The demo's node: calls services, publishes instructions, and records topics."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_lab.demo.bag import DemoBag
from pi05_lab.demo.processes import DemoProcesses
from pi05_lab.demo.report import DemoRecord
from pi05_ros.msg import ActionChunk, PolicyStatus
from pi05_ros.nodes.messages import INSTRUCTION_QOS, TRAJECTORY_QOS, to_seconds

ALL_CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
CONTROLLERS = ("left_arm_controller", "right_arm_controller")
TRANSITIONS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
}


class DemoError(RuntimeError):
    """The demo failed; the message says why."""


class DemoClient:
    """Spins a node in its own thread; every method is called from the main thread."""

    def __init__(
        self, record: DemoRecord, processes: DemoProcesses, bag: Path | None = None
    ) -> None:
        self.record = record
        self._processes = processes
        rclpy.init()
        self._node = node = rclpy.create_node("pi05_demo")
        self.status = PolicyStatus()
        self._statuses = 0
        self._diagnostics: dict[str, dict[str, str]] = {}
        self._messages: dict[str, str] = {}
        self._diagnostics_seen = 0
        self._last_trajectory: dict[str, JointTrajectory] = {}
        node.create_subscription(PolicyStatus, "policy/status", self._on_status, 10)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        node.create_subscription(JointState, "joint_states", self._on_joint_state, 50)
        node.create_subscription(Float64MultiArray, "aloha_sim/qpos", self._on_qpos, 50)
        node.create_subscription(ActionChunk, "policy/action_chunk", self._on_chunk, 50)
        for name in CONTROLLERS:
            record.commanded_s[name], record.commanded[name] = [], []
            node.create_subscription(
                JointTrajectory,
                f"{name}/joint_trajectory",
                functools.partial(self._on_trajectory, name),
                TRAJECTORY_QOS,
            )
        self._instruction = node.create_publisher(String, "instruction", INSTRUCTION_QOS)
        self._set_qpos = node.create_publisher(Float64MultiArray, "aloha_sim/set_qpos", 10)
        self._change_state = node.create_client(ChangeState, "policy/change_state")
        self._set_parameters = node.create_client(SetParameters, "aloha_sim/set_parameters")
        self._bag = None if bag is None else DemoBag(node, bag, ALL_CAMERAS, CONTROLLERS)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(2.0)
        if self._bag is not None:
            self._bag.close()
        self._node.destroy_node()
        rclpy.try_shutdown()

    def check(self) -> None:
        """Raise DemoError if one of the processes has ended."""
        problem = self._processes.problem()
        if problem:
            raise DemoError(problem)

    def wait_for_robot(self, timeout_s: float) -> None:
        """Wait until joint states arrive."""
        self._wait(lambda: bool(self.record.measured), timeout_s, "no joint state arrived")

    def change_state(self, transition: str, timeout_s: float) -> None:
        """Request a lifecycle transition of the policy node and wait for it."""
        request = ChangeState.Request(transition=Transition(id=TRANSITIONS[transition]))
        response = self._call(self._change_state, request, timeout_s, transition)
        if not response.success:
            time.sleep(0.2)  # until the log has its last line
            reason = self._processes.last_log_line("policy_node")
            raise DemoError(f"the policy node refused to {transition}: {reason}")

    def fresh_status(self) -> PolicyStatus:
        """Wait for a status that is published after this call."""
        seen = self._statuses
        self._wait(lambda: self._statuses > seen + 1, 5.0, "the policy node publishes no status")
        return self.status

    def policy_part(self, name: str) -> dict[str, str]:
        """Latest values of one of the policy node's parts on /diagnostics."""
        return self._diagnostics[f"policy: {name}"]

    def send_instruction(self, text: str) -> None:
        """Wait for a subscriber, then publish once."""
        self._wait_for_subscriber(self._instruction, "the instruction topic has no subscriber")
        self.record.instructions.append((self._now_s(), text))
        self._instruction.publish(String(data=text))

    def place(self, qpos: Sequence[float]) -> None:
        """Set the simulator's state [nq] and wait until it is there."""
        self._wait_for_subscriber(self._set_qpos, "aloha_sim/set_qpos has no subscriber")
        seen = len(self.record.qpos)
        self._set_qpos.publish(Float64MultiArray(data=qpos))
        self._wait(
            lambda: any(
                max(abs(a - b) for a, b in zip(mine, qpos, strict=True)) < 0.02
                for mine in self.record.qpos[max(seen, len(self.record.qpos) - 3) :]
            ),
            5.0,
            "the simulator did not reach the state",
        )

    def set_cameras(self, names: Sequence[str] | None) -> None:
        """Set the simulator's publishing cameras; None: all of them."""
        chosen = list(ALL_CAMERAS if names is None else names)
        value = Parameter("active_cameras", Parameter.Type.STRING_ARRAY, chosen)
        request = SetParameters.Request(parameters=[value.to_parameter_msg()])
        response = self._call(self._set_parameters, request, 5.0, "set active_cameras")
        if not response.results[0].successful:
            raise DemoError(f"the simulator refused active_cameras: {response.results[0].reason}")

    def frame_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Frames published by the simulator and received by the policy node so far, by camera."""
        seen = self._diagnostics_seen
        self._wait(
            lambda: self._diagnostics_seen > seen + 1, 5.0, "the simulator publishes no diagnostics"
        )
        status = self.fresh_status()
        values = self._diagnostics["aloha_sim: cameras"]
        published = {name: int(values[f"{name} published"]) for name in status.cameras}
        return published, dict(zip(status.cameras, status.frames_received, strict=True))

    def keep_last_trajectories(self) -> None:
        """Record the remaining points of the last trajectories, which nothing replaces."""
        for controller, message in self._last_trajectory.items():
            self._keep_points(controller, message, message.points[1:])

    def keep_simulator_figures(self) -> None:
        """Record the simulator's speed and rejections, from its diagnostics."""
        record = self.record
        record.real_time_factor = float(self._diagnostics["aloha_sim: physics"]["real time factor"])
        for name in CONTROLLERS:
            key = f"aloha_sim: {name}"
            rejected = int(self._diagnostics[key]["rejected"])
            record.trajectories_rejected += rejected
            if rejected:
                record.rejection = self._messages[key]

    def _wait_for_subscriber(self, publisher: Publisher, otherwise: str) -> None:
        self._wait(lambda: publisher.get_subscription_count() > 0, 5.0, otherwise)

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def _now_s(self) -> float:
        return float(self._node.get_clock().now().nanoseconds * 1e-9)

    def _wait(self, condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() > deadline_s:
                raise DemoError(f"{otherwise} within {timeout_s:g} s")
            time.sleep(0.02)

    def _call(self, client: Any, request: Any, timeout_s: float, what: str) -> Any:
        self._wait(client.service_is_ready, timeout_s, f"no service to {what}")
        future = client.call_async(request)
        self._wait(future.done, timeout_s, f"no answer to {what}")
        return future.result()

    def _on_status(self, message: PolicyStatus) -> None:
        self.status = message
        self._statuses += 1

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._diagnostics[status.name] = {pair.key: pair.value for pair in status.values}
            self._messages[status.name] = status.message
            if status.name == "aloha_sim: cameras":
                self._diagnostics_seen += 1

    def _on_joint_state(self, message: JointState) -> None:
        self.record.joint_names = list(message.name)
        self.record.measured_s.append(to_seconds(message.header.stamp))
        self.record.measured.append(list(message.position))

    def _on_qpos(self, message: Float64MultiArray) -> None:
        self.record.qpos_s.append(message.data[0])
        self.record.qpos.append(list(message.data[1:]))

    def _on_chunk(self, message: ActionChunk) -> None:
        stamp_s = to_seconds(message.header.stamp)
        self.record.chunks.append((self._now_s(), stamp_s, message.latency_s))

    def _on_trajectory(self, controller: str, message: JointTrajectory) -> None:
        self.record.controller_joints[controller] = list(message.joint_names)
        self._keep_points(controller, message, message.points[:1])
        self._last_trajectory[controller] = message

    def _keep_points(
        self, controller: str, message: JointTrajectory, points: Sequence[JointTrajectoryPoint]
    ) -> None:
        for point in points:
            due_s = to_seconds(message.header.stamp) + to_seconds(point.time_from_start)
            self.record.commanded_s[controller].append(due_s)
            self.record.commanded[controller].append(list(point.positions))


@contextmanager
def connect(
    processes: DemoProcesses, record: DemoRecord, bag: Path | None = None
) -> Iterator[DemoClient]:
    """Start the processes and a client; stop both at the end, and record what went wrong."""
    client = None
    try:
        processes.start()
        client = DemoClient(record, processes, bag)
        yield client
    finally:
        if client is not None:
            client.close()
        record.problems += processes.stop()
