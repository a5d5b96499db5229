"""Topics that must have one publisher: the joint states, and each controller's commands."""

from __future__ import annotations

from collections.abc import Iterable

from rclpy.node import Node


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
