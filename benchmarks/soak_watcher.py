"""The soak's place between the nodes: passes joint states on, checks trajectories, gives orders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pi05_ros.nodes.environment import share_directory

INSTRUCTION = "wave with the left arm"
"""The robot's own; any other is a fault."""


class Watcher:
    """Stands between the nodes: passes joint states on, checks trajectories, gives orders."""

    def __init__(self) -> None:
        import rclpy
        from lifecycle_msgs.srv import ChangeState
        from rcl_interfaces.srv import SetParameters
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import JointState
        from std_msgs.msg import String
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory

        from pi05_ros.evaluation.robot_config import read_robot_config
        from pi05_ros.msg import ActionChunk, PolicyStatus
        from pi05_ros.nodes.messages import INSTRUCTION_QOS, TRAJECTORY_QOS

        robot = read_robot_config(share_directory() / "config" / "aloha.yaml")
        self._joints, self._dt_s = robot.joints, robot.dt_s
        self.spoil: Callable[[Any], Any] = lambda message: message
        self.trajectories = self.violations = 0
        self.state = 0
        self.chunk_s = self.trajectory_s = 0.0
        rclpy.init()
        self.node = node = rclpy.create_node("soak")
        self._states = node.create_publisher(JointState, "joint_states", 10)
        self._instructions = node.create_publisher(String, "instruction", INSTRUCTION_QOS)
        node.create_subscription(JointState, "sim/joint_states", self._on_joints, 10)
        node.create_subscription(PolicyStatus, "policy/status", self._on_status, 10)
        node.create_subscription(ActionChunk, "policy/action_chunk", self._on_chunk, 10)
        for name in robot.controllers:
            node.create_subscription(
                JointTrajectory, f"{name}/joint_trajectory", self._on_trajectory, TRAJECTORY_QOS
            )
        self._services = {
            "policy/change_state": node.create_client(ChangeState, "policy/change_state"),
            "policy/stop": node.create_client(Trigger, "policy/stop"),
            "policy/resume": node.create_client(Trigger, "policy/resume"),
            "aloha_sim/set_parameters": node.create_client(
                SetParameters, "aloha_sim/set_parameters"
            ),
        }
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        threading.Thread(target=executor.spin, daemon=True).start()

    def call(self, service: str, request: Any, timeout_s: float = 30.0) -> bool:
        """Whether the service answered in time."""
        client = self._services[service]
        deadline_s = time.monotonic() + timeout_s
        if not client.wait_for_service(timeout_s):
            return False
        future = client.call_async(request)
        while not future.done() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return bool(future.done())

    def trigger(self, service: str) -> None:
        from std_srvs.srv import Trigger

        self.call(service, Trigger.Request())

    def transition(self, name: str) -> None:
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        number = getattr(Transition, f"TRANSITION_{name.upper()}")
        self.call("policy/change_state", ChangeState.Request(transition=Transition(id=number)))

    def set_cameras(self, names: Sequence[str]) -> None:
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        change = Parameter("active_cameras", value=list(names)).to_parameter_msg()
        self.call("aloha_sim/set_parameters", SetParameters.Request(parameters=[change]))

    def instruct(self, text: str) -> None:
        from std_msgs.msg import String

        self._instructions.publish(String(data=text))

    def recovered(self, since_s: float) -> bool:
        """Whether a chunk for the robot's own instruction came, and then a command."""
        return since_s < self.chunk_s <= self.trajectory_s

    def _on_joints(self, message: Any) -> None:
        self._states.publish(self.spoil(message))

    def _on_status(self, message: Any) -> None:
        self.state = message.state

    def _on_chunk(self, message: Any) -> None:
        if message.instruction == INSTRUCTION:
            self.chunk_s = time.monotonic()

    def _on_trajectory(self, message: Any) -> None:
        self.trajectory_s = time.monotonic()
        self.trajectories += 1
        columns = [self._joints.names.index(name) for name in message.joint_names]
        positions = np.array([point.positions for point in message.points])
        velocities = np.array([point.velocities for point in message.points])
        changes = np.abs(np.diff(velocities, axis=0))
        joints = self._joints
        sound = (
            np.isfinite(positions).all()
            and (positions >= joints.lower[columns] - 1e-6).all()
            and (positions <= joints.upper[columns] + 1e-6).all()
            and (np.abs(velocities) <= joints.max_velocity[columns] + 1e-6).all()
            and (changes <= joints.max_acceleration[columns] * self._dt_s + 1e-6).all()
            and not velocities[-1].any()
        )
        self.violations += not sound
