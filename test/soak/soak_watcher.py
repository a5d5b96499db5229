"""The soak's relay between simulator and policy node: it replaces driver and controllers.

It relays joint states of the simulator to the policy node, altered during faults, and trajectories
of the policy node to the simulator, which it checks.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from soak_checks import Points, TrajectoryCheck

from pi05_ros.nodes.main import share_directory

INSTRUCTION = "wave with the left arm"
"""The robot's; any other is a fault."""
QUEUE = 100
SECOND_PUBLISHER_OFFSET_RAD = 0.3


class Watcher:
    """Relays joint states and trajectories, checks trajectories, calls services."""

    def __init__(self) -> None:
        import rclpy
        from lifecycle_msgs.srv import ChangeState
        from rcl_interfaces.srv import SetParameters
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSProfile
        from sensor_msgs.msg import JointState
        from std_msgs.msg import String
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory

        from pi05_ros.msg import ActionChunk, PolicyStatus
        from pi05_ros.nodes.messages import INSTRUCTION_QOS, TRAJECTORY_QOS
        from pi05_ros.robot_config import read_robot_config

        robot = read_robot_config(share_directory() / "config" / "aloha.yaml")
        self.scheduling = robot.scheduler
        self.alter: Callable[[Any], Any] = lambda message: message
        self.follows = True
        """Whether trajectories are relayed; False as with drives that are off."""
        self.trajectories = 0
        self.violations: list[str] = []
        """Controller, stamp and kind of each."""
        self.state = 0
        self.problems: Sequence[str] = ()
        self.seen: set[str] = set()
        """All problems of the status since `seen` was cleared."""
        self.chunk_s = self.trajectory_s = 0.0
        rclpy.init()
        self.node = node = rclpy.create_node("soak")
        self._states = node.create_publisher(JointState, "joint_states", 10)
        self._instructions = node.create_publisher(String, "instruction", INSTRUCTION_QOS)
        node.create_subscription(JointState, "sim/joint_states", self._on_joints, 10)
        node.create_subscription(PolicyStatus, "policy/status", self._on_status, 10)
        node.create_subscription(ActionChunk, "policy/action_chunk", self._on_chunk, 10)
        self._checks: dict[str, TrajectoryCheck] = {}
        self._to_sim: dict[str, Any] = {}
        self._subscriptions: dict[str, Any] = {}
        self._second: tuple[str, Any] | None = None
        self._qos = QoSProfile(depth=QUEUE)
        self._message_type = JointTrajectory
        for name, columns in robot.columns.items():
            self._checks[name] = TrajectoryCheck(robot.joints, list(columns), robot.dt_s)
            self._to_sim[name] = node.create_publisher(
                JointTrajectory, f"sim/{name}/joint_trajectory", TRAJECTORY_QOS
            )
            self.subscribe(name)
        self._services = {
            "policy/change_state": node.create_client(ChangeState, "policy/change_state"),
            "policy/stop": node.create_client(Trigger, "policy/stop"),
            "policy/resume": node.create_client(Trigger, "policy/resume"),
            "policy/set_parameters": node.create_client(SetParameters, "policy/set_parameters"),
            "aloha_sim/set_parameters": node.create_client(
                SetParameters, "aloha_sim/set_parameters"
            ),
        }
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        threading.Thread(target=executor.spin, daemon=True).start()

    @property
    def controllers(self) -> list[str]:
        return list(self._checks)

    @property
    def boundaries(self) -> int:
        """Chunk boundaries in motion that were compared."""
        return sum(check.compared for check in self._checks.values())

    def subscribe(self, controller: str) -> None:
        """Subscribe as the controller does."""
        self._checks[controller].reset()
        self._subscriptions[controller] = self.node.create_subscription(
            self._message_type,
            f"{controller}/joint_trajectory",
            functools.partial(self._on_trajectory, controller),
            self._qos,
        )

    def unsubscribe(self, controller: str) -> None:
        """End the controller's subscription."""
        self.node.destroy_subscription(self._subscriptions.pop(controller))

    def add_publisher(self, topic: str) -> None:
        """A second publisher; on joint_states it publishes wrong positions."""
        from sensor_msgs.msg import JointState

        kind = JointState if topic == "joint_states" else self._message_type
        self._second = (topic, self.node.create_publisher(kind, topic, 10))

    def remove_publisher(self) -> None:
        assert self._second is not None
        (_, publisher), self._second = self._second, None
        self.node.destroy_publisher(publisher)

    def reset(self) -> None:
        """The next trajectories come from another process."""
        for check in self._checks.values():
            check.reset()

    def call(self, service: str, request: Any, timeout_s: float = 10.0) -> Any:
        """The service's response; None after a timeout."""
        client = self._services[service]
        deadline_s = time.monotonic() + timeout_s
        if not client.wait_for_service(timeout_s):
            return None
        future = client.call_async(request)
        while not future.done() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return future.result() if future.done() else None

    def trigger(self, service: str) -> None:
        from std_srvs.srv import Trigger

        self.call(service, Trigger.Request())

    def transition(self, name: str) -> None:
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        number = getattr(Transition, f"TRANSITION_{name.upper()}")
        self.call("policy/change_state", ChangeState.Request(transition=Transition(id=number)))

    def set_parameter(self, node: str, name: str, value: object) -> str:
        """Reason of a refusal; empty if the node accepted."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        change = Parameter(name, value=value).to_parameter_msg()
        response = self.call(f"{node}/set_parameters", SetParameters.Request(parameters=[change]))
        if response is None:
            return "no answer"
        (result,) = response.results
        return "" if result.successful else result.reason or "refused without a reason"

    def set_cameras(self, names: Sequence[str]) -> None:
        self.set_parameter("aloha_sim", "active_cameras", list(names))

    def instruct(self, text: str) -> None:
        from std_msgs.msg import String

        self._instructions.publish(String(data=text))

    def recovered(self, since_s: float) -> bool:
        """Whether a chunk for the robot's instruction arrived, and then a command."""
        return since_s < self.chunk_s <= self.trajectory_s

    def _on_joints(self, message: Any) -> None:
        second = self._second
        if second is not None and second[0] == "joint_states":
            wrong = type(message)(header=message.header, name=message.name)
            wrong.position = np.asarray(message.position) + SECOND_PUBLISHER_OFFSET_RAD
            second[1].publish(wrong)
        self._states.publish(self.alter(message))

    def _on_status(self, message: Any) -> None:
        self.state, self.problems = message.state, list(message.problems)
        self.seen.update(self.problems)

    def _on_chunk(self, message: Any) -> None:
        if message.instruction == INSTRUCTION:
            self.chunk_s = time.monotonic()

    def _on_trajectory(self, controller: str, message: Any) -> None:
        arrival_s = self.node.get_clock().now().nanoseconds * 1e-9
        if self.follows:
            self._to_sim[controller].publish(message)
        self.trajectory_s = time.monotonic()
        self.trajectories += 1
        stamp_s = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        points = Points(
            stamp_s,
            np.array([point.positions for point in message.points]),
            np.array([point.velocities for point in message.points]),
        )
        wrong = self._checks[controller].check(points, arrival_s)
        if wrong:
            self.violations.append(f"{controller} at {stamp_s:.3f} s: {', '.join(wrong)}")
