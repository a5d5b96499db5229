"""What other nodes in the ROS graph make unsafe or impossible: QoS, publishers, controllers.

Second publishers and unsafe controllers keep the arms at rest; a QoS mismatch is named, because ROS
drops their messages silently.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import GetParameters
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, qos_check_compatible, qos_policy_name_from_kind

from pi05_ros.types import Level, Problem

REPLACEMENT = "allow_trajectory_replacement"
ANSWER_S = 1.0
"""A node that has not answered by then has no such parameter: a driver, a simulator."""
DISCOVERY_S = 2.0
"""An event may arrive before the graph shows the endpoint that it is about."""


def full_name(endpoint: Any) -> str:
    """The node of an endpoint of the graph, with its namespace."""
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"


def second_publishers(node: Node, topics: Iterable[str]) -> list[Problem]:
    """The topics with more than one publisher; about 10 µs per topic.

    Two drivers on `joint_states` alternate between two robots' positions; two policies on one
    controller pull it back and forth. A process that was killed stays in the graph for the
    lease that it announced: 8 s with config/fastdds_shm.xml, 20 s with FastDDS's defaults.
    """
    found = []
    for topic in topics:
        if node.count_publishers(topic) < 2:
            continue
        names = sorted(map(full_name, node.get_publishers_info_by_topic(topic)))
        text = (
            f"publishers: {len(names)} on {node.resolve_topic_name(topic)} "
            f"({', '.join(names)}); stop all but one"
        )
        found.append(Problem("publishers", text, Level.ERROR, (topic,)))
    return found


class QosMonitor:
    """Keeps the middleware's incompatible-QoS events until the mismatch is over."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._mismatches: dict[str, tuple[Problem, float]] = {}
        """Topic → problem, and when it began by time.monotonic."""

    def subscription_events(self, topic: str) -> SubscriptionEventCallbacks:
        """For a subscription of this node to `topic`."""
        return SubscriptionEventCallbacks(
            incompatible_qos=lambda event: self._on_event(topic, event, "publisher")
        )

    def publisher_events(self, topic: str) -> PublisherEventCallbacks:
        """For a publisher of this node on `topic`."""
        return PublisherEventCallbacks(
            incompatible_qos=lambda event: self._on_event(topic, event, "subscriber")
        )

    def problems(self) -> list[Problem]:
        now_s = time.monotonic()
        for topic, (_, since_s) in list(self._mismatches.items()):
            if now_s - since_s > DISCOVERY_S and not self._lasts(topic):
                del self._mismatches[topic]
        return [problem for problem, _ in self._mismatches.values()]

    def clear(self) -> None:
        """The endpoints are gone."""
        self._mismatches.clear()

    def _on_event(self, topic: str, event: Any, other: str) -> None:
        name = str(self._node.resolve_topic_name(topic))
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        text = f"topic {name}: a {other} has an incompatible QoS, policy {policy}; no messages pass"
        self._mismatches[name] = Problem("topic", text, Level.ERROR, (name,)), time.monotonic()
        self._node.get_logger().error(text)

    def _lasts(self, topic: str) -> bool:
        """Whether the graph has an incompatible pair on `topic`, one of them of this node.

        Both profiles come from the graph, where the middleware has filled in what code leaves open.
        """
        requests = self._node.get_subscriptions_info_by_topic(topic)
        own = f"{self._node.get_namespace().rstrip('/')}/{self._node.get_name()}"
        return any(
            own in (full_name(offer), full_name(request))
            and qos_check_compatible(offer.qos_profile, request.qos_profile)[0]
            == QoSCompatibility.ERROR
            for offer in self._node.get_publishers_info_by_topic(topic)
            for request in requests
        )


@dataclass
class _Controller:
    client: Any
    """None once the answer has arrived, or does not come."""
    since_s: float
    answer: Any = None
    replaces: bool = False


class ControllerCheck:
    """Reads the parameters of each node that subscribes to trajectories, once per subscription.

    joint_trajectory_controller executes every message late by its age, a step back each time, where
    `allow_trajectory_replacement` is true: its default from ros2_controllers 6.8 on
    (docs/controllers.md).
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._controllers: dict[str, _Controller] = {}

    def problems(self, controllers: Iterable[str]) -> list[Problem]:
        """Why nothing may move, by the full names of the subscribers to trajectories."""
        names = set(controllers)
        for name in set(self._controllers) - names:
            self._release(self._controllers.pop(name))
        texts = [self._problem(name) for name in sorted(names)]
        return [Problem("controllers", text, Level.ERROR) for text in texts if text]

    def clear(self) -> None:
        """The outputs are gone."""
        for controller in self._controllers.values():
            self._release(controller)
        self._controllers.clear()

    def _problem(self, name: str) -> str:
        controller = self._controllers.get(name)
        if controller is None:
            client = self._node.create_client(GetParameters, f"{name}/get_parameters")
            controller = self._controllers[name] = _Controller(client, time.monotonic())
        if controller.client is not None:
            self._read(controller)
        if controller.replaces:
            return (
                f"controllers: {name} has {REPLACEMENT}: true, which breaks the limits; set it to "
                "false (docs/controllers.md) and restart the controller"
            )
        if controller.client is not None:
            return f"controllers: the settings of {name} are not read yet"
        return ""

    def _read(self, controller: _Controller) -> None:
        answer = controller.answer
        if answer is None and controller.client.service_is_ready():
            request = GetParameters.Request(names=[REPLACEMENT])
            answer = controller.answer = controller.client.call_async(request)
        answered = answer is not None and answer.done()
        if answered:
            controller.replaces = any(
                value.type == ParameterType.PARAMETER_BOOL and value.bool_value
                for value in answer.result().values
            )
        if answered or time.monotonic() - controller.since_s > ANSWER_S:
            self._release(controller)

    def _release(self, controller: _Controller) -> None:
        if controller.client is not None:
            self._node.destroy_client(controller.client)
            controller.client = None
