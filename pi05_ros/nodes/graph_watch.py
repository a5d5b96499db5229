"""Publishers and subscribers that cannot talk to each other, told by topic and policy.

Topics that must have one publisher: the joint states, and each controller's commands.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, qos_check_compatible, qos_policy_name_from_kind


class PublisherWatch:
    """Finds second publishers in the ROS graph.

    Two drivers on `joint_states` alternate between two robots' positions; two policies on one
    controller pull it back and forth. A process that was killed stays in the graph for the
    lease that it announced: 8 s with config/fastdds_shm.xml, 20 s with FastDDS's defaults.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def conflicts(self, command_topics: Iterable[str], joint_topic: str) -> list[str]:
        """One line per topic with too many publishers; about 10 µs per topic."""
        found = []
        for topic in (joint_topic, *command_topics):
            if self._node.count_publishers(topic) < 2:
                continue
            infos = self._node.get_publishers_info_by_topic(topic)
            names = sorted(f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in infos)
            found.append(
                f"publishers: {len(infos)} on {self._node.resolve_topic_name(topic)} "
                f"({', '.join(names)}); stop all but one"
            )
        return found


DISCOVERY_S = 2.0
"""An event may come before the graph shows the endpoint that it is about."""


@dataclass(frozen=True)
class _Mismatch:
    text: str
    since_s: float
    """By time.monotonic."""


class QosWatch:
    """Keeps what the middleware's incompatible-QoS events told, until it is no longer true.

    ROS drops the messages of such a pair silently.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._mismatches: dict[str, _Mismatch] = {}

    def subscription_events(self, topic: str) -> SubscriptionEventCallbacks:
        """For a subscription of ours to `topic`."""
        return SubscriptionEventCallbacks(
            incompatible_qos=lambda event: self._tell(topic, event, "publisher")
        )

    def publisher_events(self, topic: str) -> PublisherEventCallbacks:
        """For a publisher of ours on `topic`."""
        return PublisherEventCallbacks(
            incompatible_qos=lambda event: self._tell(topic, event, "subscriber")
        )

    def problems(self) -> Sequence[str]:
        """The mismatches that there are, one line each."""
        now_s = time.monotonic()
        for topic, mismatch in list(self._mismatches.items()):
            if now_s - mismatch.since_s > DISCOVERY_S and not self._lasts(topic):
                del self._mismatches[topic]
        return [mismatch.text for mismatch in self._mismatches.values()]

    def clear(self) -> None:
        """Forget all: the endpoints are gone."""
        self._mismatches.clear()

    def _tell(self, topic: str, event: Any, other: str) -> None:
        name = str(self._node.resolve_topic_name(topic))
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        text = f"topic {name}: a {other} has an incompatible QoS, policy {policy}; no messages pass"
        self._mismatches[name] = _Mismatch(text, time.monotonic())
        self._node.get_logger().error(text)

    def _lasts(self, topic: str) -> bool:
        """Whether the graph has a pair on `topic` that does not fit, one of them ours.

        Both profiles are taken from the graph: a profile as it was written leaves open what the
        middleware fills in.
        """
        offers = self._node.get_publishers_info_by_topic(topic)
        requests = self._node.get_subscriptions_info_by_topic(topic)
        return any(
            (self._is_ours(offer) or self._is_ours(request))
            and qos_check_compatible(offer.qos_profile, request.qos_profile)[0]
            == QoSCompatibility.ERROR
            for offer in offers
            for request in requests
        )

    def _is_ours(self, endpoint: Any) -> bool:
        ours = (self._node.get_name(), self._node.get_namespace())
        return bool((endpoint.node_name, endpoint.node_namespace) == ours)
