"""Where commands go: one output per controller, by what the controller takes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.config import ControllerParameters, ParameterError
from pi05_ros.control.trajectory import CommandStream, TrajectoryPoints
from pi05_ros.nodes.graph_watch import QosWatch
from pi05_ros.nodes.messages import TRAJECTORY_QOS, trajectory_message

OBSERVERS = (
    *("rosbag2", "_ros2cli", "rqt", "rviz", "foxglove", "rosbridge", "plotjuggler", "rerun"),
    "pi05_demo",
)
"""Beginnings of the names of nodes that record or show commands and move nothing."""
UNKNOWN_NODES = ("_NODE_NAME_UNKNOWN_", "_CREATED_BY_BARE_DDS_APP_")
"""What the middleware calls a node before its name has arrived, or without one."""
NAMES_VALID_S = 0.5
"""How long the subscribers' names are used without another look at the graph."""


class Output(ABC):
    """Sends one controller its joints of the commanded motion."""

    direct = False
    """The controller takes one command per tick and holds the last one for ever."""

    def __init__(
        self,
        node: Node,
        topic: str,
        message_type: type,
        qos: QoSProfile,
        columns: Sequence[int],
        controller_node: str = "",
        watch: QosWatch | None = None,
    ) -> None:
        """`controller_node`: the node that must subscribe; empty accepts any but `OBSERVERS`."""
        self.topic = topic
        self.columns = list(columns)
        self._node = node
        self._controller_node = controller_node
        self._subscribers = 0
        self._names: tuple[str, ...] = ()
        self._names_until_s = 0.0
        self._publisher = node.create_publisher(
            message_type, topic, qos,
            event_callbacks=None if watch is None else watch.publisher_events(topic),
        )  # fmt: skip

    @property
    def subscribers(self) -> int:
        """All of them, recorders included."""
        return int(self._publisher.get_subscription_count())

    @property
    def subscriber_names(self) -> tuple[str, ...]:
        """The nodes that subscribe, by the last look at the graph."""
        return self._names

    @property
    def controllers(self) -> tuple[str, ...]:
        """Those of them that can move the joints."""
        return tuple(name for name in self._names if self._moves(name))

    def has_controller(self) -> bool:
        """Whether a node subscribes that can move the joints; called at every tick."""
        count, now_s = self.subscribers, time.monotonic()
        if count == 0:
            self._subscribers, self._names = 0, ()
            return False
        if count != self._subscribers or now_s >= self._names_until_s:
            infos = self._node.get_subscriptions_info_by_topic(self.topic)
            self._names = tuple(sorted(_full_name(info) for info in infos))
            self._subscribers, self._names_until_s = count, now_s + NAMES_VALID_S
        return any(self._moves(name) for name in self._names)

    def _moves(self, full_name: str) -> bool:
        name = full_name.rpartition("/")[2]
        if self._controller_node:
            return self._controller_node in (name, full_name)
        return name not in UNKNOWN_NODES and not name.startswith(OBSERVERS)

    def destroy(self) -> None:
        self._node.destroy_publisher(self._publisher)

    @abstractmethod
    def send_trajectory(self, trajectory: TrajectoryPoints) -> int:
        """Send a trajectory, if the controller takes them; the number of messages sent."""

    @abstractmethod
    def send_command(self, stream: CommandStream, now_s: float) -> int:
        """Send the command of this tick, if the controller takes one per tick."""

    @abstractmethod
    def send_rest(self) -> int:
        """Keep a controller at rest that would otherwise move on."""


def _full_name(endpoint: Any) -> str:
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"


class TrajectoryOutput(Output):
    """trajectory_msgs/JointTrajectory for joint_trajectory_controller."""

    def __init__(
        self,
        node: Node,
        topic: str,
        names: Sequence[str],
        columns: Sequence[int],
        controller_node: str = "",
        watch: QosWatch | None = None,
    ) -> None:
        super().__init__(
            node, topic, JointTrajectory, TRAJECTORY_QOS, columns, controller_node, watch
        )
        self._joint_names = list(names)

    def send_trajectory(self, trajectory: TrajectoryPoints) -> int:
        self._publisher.publish(
            trajectory_message(
                self._joint_names,
                trajectory.stamp_s,
                trajectory.times_from_start_s,
                trajectory.positions[:, self.columns],
                trajectory.velocities[:, self.columns],
            )
        )
        return 1

    def send_command(self, stream: CommandStream, now_s: float) -> int:
        return 0

    def send_rest(self) -> int:
        return 0


class DirectOutput(Output):
    """One command per tick: the position or velocity at the next tick.

    The controller holds its last command for ever, so a motion ends with a command at rest:
    positions stay, velocities are 0.
    """

    direct = True

    def __init__(
        self,
        node: Node,
        topic: str,
        columns: Sequence[int],
        *,
        velocities: bool = False,
        message_type: type = Float64MultiArray,
        group: str = "",
        controller_node: str = "",
        watch: QosWatch | None = None,
    ) -> None:
        super().__init__(node, topic, message_type, TRAJECTORY_QOS, columns, controller_node, watch)
        self._velocities = velocities
        self._message_type = message_type
        self._group = group

    def send_trajectory(self, trajectory: TrajectoryPoints) -> int:
        return 0

    def send_command(self, stream: CommandStream, now_s: float) -> int:
        state = stream.commanded(now_s + stream.dt_s)
        values = state.velocity if self._velocities else state.position
        return self._publish(values[self.columns].tolist())

    def send_rest(self) -> int:
        return self._publish([0.0] * len(self.columns)) if self._velocities else 0

    def _publish(self, values: list[float]) -> int:
        if self._message_type is Float64MultiArray:
            self._publisher.publish(Float64MultiArray(data=values))
        else:
            self._publisher.publish(self._message_type(name=self._group, cmd=values))
        return 1


def make_output(
    node: Node,
    controller: str,
    parameters: ControllerParameters,
    names: Sequence[str],
    columns: Sequence[int],
    watch: QosWatch | None = None,
) -> Output:
    """The output of `controllers.<controller>.*`; `names` are its joints.

    Raises:
        ParameterError: interbotix's messages are not installed.
    """
    kind = parameters.output
    topic = parameters.topic_of(controller)
    if kind == "joint_trajectory":
        return TrajectoryOutput(node, topic, names, columns, parameters.node, watch)
    if kind == "interbotix":
        return DirectOutput(
            node,
            topic,
            columns,
            message_type=_joint_group_command(),
            group=parameters.group,
            controller_node=parameters.node,
            watch=watch,
        )
    return DirectOutput(
        node,
        topic,
        columns,
        velocities=kind == "forward_velocity",
        controller_node=parameters.node,
        watch=watch,
    )


def _joint_group_command() -> Any:
    try:
        from interbotix_xs_msgs.msg import JointGroupCommand
    except ModuleNotFoundError as error:
        raise ParameterError(
            "controllers.*.output interbotix needs the package interbotix_xs_msgs, which is not "
            "installed here; output joint_trajectory or forward_position need none"
        ) from error
    return JointGroupCommand
