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
from pi05_ros.nodes.messages import TRAJECTORY_QOS, trajectory_message
from pi05_ros.nodes.qos_watch import QosWatch


class Output(ABC):
    """Sends one controller its joints of the commanded motion."""

    in_between = True
    """Whether what comes between two control ticks is sent at once."""

    def __init__(
        self,
        node: Node,
        topic: str,
        message_type: type,
        qos: QoSProfile,
        columns: Sequence[int],
        watch: QosWatch | None = None,
    ) -> None:
        self.topic = topic
        self.columns = list(columns)
        self._node = node
        self._publisher = node.create_publisher(
            message_type, topic, qos,
            event_callbacks=None if watch is None else watch.publisher_events(topic),
        )  # fmt: skip

    @property
    def listeners(self) -> int:
        return int(self._publisher.get_subscription_count())

    @property
    def deaf(self) -> bool:
        """Nobody listens: a controller that starts later would follow in mid-way."""
        return self.listeners == 0

    def destroy(self) -> None:
        self._node.destroy_publisher(self._publisher)

    @abstractmethod
    def send(self, trajectory: TrajectoryPoints | None, stream: CommandStream, now_s: float) -> int:
        """Send what this tick brought; returns how many messages went out."""

    def brake(self, trajectory: TrajectoryPoints, stream: CommandStream, now_s: float) -> int:
        """Send the braking motion of `stream.hold`, as a whole or in time; blocks until sent."""
        return self.send(trajectory, stream, now_s)


class TrajectoryOutput(Output):
    """trajectory_msgs/JointTrajectory for joint_trajectory_controller."""

    def __init__(
        self,
        node: Node,
        topic: str,
        names: Sequence[str],
        columns: Sequence[int],
        watch: QosWatch | None = None,
    ) -> None:
        super().__init__(node, topic, JointTrajectory, TRAJECTORY_QOS, columns, watch)
        self._names = list(names)

    def send(self, trajectory: TrajectoryPoints | None, stream: CommandStream, now_s: float) -> int:
        if trajectory is None:
            return 0
        self._publisher.publish(
            trajectory_message(
                self._names,
                trajectory.stamp_s,
                trajectory.times_from_start_s,
                trajectory.positions[:, self.columns],
                trajectory.velocities[:, self.columns],
            )
        )
        return 1


class DirectOutput(Output):
    """One command per tick: where the joints should be, or how fast, when the next one comes.

    Such a controller holds its last command for ever. While nothing is commanded, positions are
    left alone and velocities are 0.
    """

    in_between = False

    def __init__(
        self,
        node: Node,
        topic: str,
        columns: Sequence[int],
        *,
        velocities: bool = False,
        message_type: type = Float64MultiArray,
        group: str = "",
        watch: QosWatch | None = None,
    ) -> None:
        super().__init__(node, topic, message_type, TRAJECTORY_QOS, columns, watch)
        self._velocities = velocities
        self._message_type = message_type
        self._group = group

    def send(self, trajectory: TrajectoryPoints | None, stream: CommandStream, now_s: float) -> int:
        if not stream.active:
            if self._velocities:
                self._publish([0.0] * len(self.columns))
            return int(self._velocities)
        self._command(stream, now_s)
        return 1

    def brake(self, trajectory: TrajectoryPoints, stream: CommandStream, now_s: float) -> int:
        started_s = time.monotonic()
        sent = 0
        while (elapsed_s := time.monotonic() - started_s) < stream.rest_time_s - now_s:
            self._command(stream, now_s + elapsed_s)
            sent += 1
            time.sleep(stream.dt_s)
        self._command(stream, stream.rest_time_s)
        return sent + 1

    def _command(self, stream: CommandStream, now_s: float) -> None:
        state = stream.commanded(now_s + stream.dt_s)
        values = state.velocity if self._velocities else state.position
        self._publish(values[self.columns].tolist())

    def _publish(self, values: list[float]) -> None:
        if self._message_type is Float64MultiArray:
            self._publisher.publish(Float64MultiArray(data=values))
        else:
            self._publisher.publish(self._message_type(name=self._group, cmd=values))


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
    endings = {"joint_trajectory": "joint_trajectory", "interbotix": "commands/joint_group"}
    topic = parameters.topic or f"{controller}/{endings.get(kind, 'commands')}"
    if kind == "joint_trajectory":
        return TrajectoryOutput(node, topic, names, columns, watch)
    if kind == "interbotix":
        return DirectOutput(
            node,
            topic,
            columns,
            message_type=_joint_group_command(),
            group=parameters.group,
            watch=watch,
        )
    return DirectOutput(node, topic, columns, velocities=kind == "forward_velocity", watch=watch)


def _joint_group_command() -> Any:
    try:
        from interbotix_xs_msgs.msg import JointGroupCommand
    except ModuleNotFoundError as error:
        raise ParameterError(
            "controllers.*.output interbotix needs the package interbotix_xs_msgs, which is not "
            "installed here; output joint_trajectory or forward_position need none"
        ) from error
    return JointGroupCommand
