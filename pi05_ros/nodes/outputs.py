"""Where commands go: one output per controller, by what the controller takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rclpy.node import Node
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.config import ControllerParameters, ParameterError
from pi05_ros.control.trajectory import CommandStream, TrajectoryPoints
from pi05_ros.nodes.graph_checks import QosMonitor, full_name
from pi05_ros.nodes.messages import TRAJECTORY_QOS, trajectory_message
from pi05_ros.robot_config import RobotConfig

OBSERVERS = (
    *("rosbag2", "_ros2cli", "rqt", "rviz", "foxglove", "rosbridge", "plotjuggler", "rerun"),
    "pi05_demo",
)
"""Beginnings of the names of nodes that record or show commands and move nothing."""
UNKNOWN_NODES = ("_NODE_NAME_UNKNOWN_", "_CREATED_BY_BARE_DDS_APP_")
"""What the middleware calls a node before its name has arrived, or without one."""
NAMES_VALID_S = 0.5
"""How long the subscribers' names are used before the graph is read again."""


class Output:
    """Sends one controller its joints of the commanded motion.

    A `direct` controller takes one command per tick: the position or velocity at the next tick. It
    holds its last command for ever, so a motion ends with a command at rest: positions stay,
    velocities are 0. Any other controller takes trajectories. `send_…` return the number of
    messages sent: 0 for what the controller does not take.
    """

    def __init__(
        self,
        node: Node,
        controller: str,
        parameters: ControllerParameters,
        names: Sequence[str],
        columns: Sequence[int],
        qos: QosMonitor | None = None,
    ) -> None:
        """`parameters`: `controllers.<controller>.*`; `names`, `columns`: of its joints.

        Raises:
            ParameterError: interbotix's messages are not installed.
        """
        self.topic = parameters.topic_of(controller)
        self.direct = parameters.output != "joint_trajectory"
        self.subscriber_names: tuple[str, ...] = ()
        """The nodes that subscribe, as the graph was last read; recorders included."""
        self._node = node
        self._controller_node = parameters.node
        self._velocities = parameters.output == "forward_velocity"
        self._names, self._columns = list(names), list(columns)
        self._subscribers = 0
        self._names_until_s = 0.0
        message_type: type = JointTrajectory
        if self.direct:
            message_type, self._to_message = _direct_message(parameters)
        events = None if qos is None else qos.publisher_events(self.topic)
        self._publisher = node.create_publisher(
            message_type, self.topic, TRAJECTORY_QOS, event_callbacks=events
        )

    def destroy(self) -> None:
        self._node.destroy_publisher(self._publisher)

    @property
    def controllers(self) -> tuple[str, ...]:
        """The subscribers that can move the joints."""
        return tuple(filter(self._moves, self.subscriber_names))

    def has_controller(self) -> bool:
        """Whether a node subscribes that can move the joints; called at every tick."""
        count, now_s = self._publisher.get_subscription_count(), time.monotonic()
        if count == 0:
            self._subscribers, self.subscriber_names = 0, ()
            return False
        if count != self._subscribers or now_s >= self._names_until_s:
            infos = self._node.get_subscriptions_info_by_topic(self.topic)
            self.subscriber_names = tuple(sorted(map(full_name, infos)))
            self._subscribers, self._names_until_s = count, now_s + NAMES_VALID_S
        return any(map(self._moves, self.subscriber_names))

    def _moves(self, node_name: str) -> bool:
        name = node_name.rpartition("/")[2]
        if self._controller_node:
            return self._controller_node in (name, node_name)
        return name not in UNKNOWN_NODES and not name.startswith(OBSERVERS)

    def send_trajectory(self, trajectory: TrajectoryPoints) -> int:
        if self.direct:
            return 0
        message = trajectory_message(
            self._names,
            trajectory.stamp_s,
            trajectory.times_from_start_s,
            trajectory.positions[:, self._columns],
            trajectory.velocities[:, self._columns],
        )
        self._publisher.publish(message)
        return 1

    def send_command(self, stream: CommandStream, now_s: float) -> int:
        """Send the command of this tick to a direct controller."""
        if not self.direct:
            return 0
        state = stream.commanded(now_s + stream.dt_s)
        values = state.velocity if self._velocities else state.position
        self._publisher.publish(self._to_message(values[self._columns].tolist()))
        return 1

    def send_rest(self) -> int:
        """Send velocity 0 to a controller that keeps the last velocity."""
        if not self._velocities:
            return 0
        self._publisher.publish(self._to_message([0.0] * len(self._columns)))
        return 1


def make_outputs(node: Node, robot: RobotConfig, qos: QosMonitor) -> Iterator[tuple[str, Output]]:
    """Each controller with its output; warns of those that a killed process leaves in motion."""
    for name, columns in robot.columns.items():
        parameters = robot.controllers[name]
        names = [robot.joints.names[column] for column in columns]
        yield name, Output(node, name, parameters, names, columns, qos)
        if parameters.output == "forward_velocity":
            node.get_logger().warning(
                f"controller {name!r} takes velocities and keeps the last one for ever: if this "
                "process is killed in motion, the arm runs on. Set a command timeout in the "
                "controller or the driver, or use joint_trajectory (docs/reliability.md)"
            )


def _direct_message(parameters: ControllerParameters) -> tuple[type, Callable[[list[float]], Any]]:
    """Type of a direct controller's messages, and values of its joints → message."""
    if parameters.output != "interbotix":
        return Float64MultiArray, lambda values: Float64MultiArray(data=values)
    try:
        from interbotix_xs_msgs.msg import JointGroupCommand
    except ModuleNotFoundError as error:
        raise ParameterError(
            "controllers.*.output interbotix needs the package interbotix_xs_msgs, which is not "
            "installed here; output joint_trajectory or forward_position need none"
        ) from error
    return JointGroupCommand, lambda values: JointGroupCommand(name=parameters.group, cmd=values)
