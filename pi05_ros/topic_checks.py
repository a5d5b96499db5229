"""Topics of a params file: valid names, and no two cameras or controllers on one topic."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_TOPIC_CHARS = 200
_PART = r"[A-Za-z_][A-Za-z0-9_]*"
_TOPIC = re.compile(rf"(~/|/)?{_PART}(/{_PART})*")
ENDINGS = {
    "joint_trajectory": "joint_trajectory",
    "forward_position": "commands",
    "forward_velocity": "commands",
    "interbotix": "commands/joint_group",
}
"""Output of a controller → the end of its default topic."""


def camera_topic(name: str, topic: str, transport: str) -> str:
    """Subscribed topic of a camera."""
    raw = topic or f"{name}/image_raw"
    return f"{raw}/compressed" if transport == "compressed" else raw


def controller_topic(name: str, topic: str, output: str) -> str:
    """Topic of a controller's commands."""
    return topic or f"{name}/{ENDINGS.get(output, 'commands')}"


def topic_fault(key: str, topics: Mapping[str, str], namespace: str = "/") -> str:
    """First fault among the parameters `key`.<name>.topic, in one line; "" without one.

    Args:
        key: "cameras" or "controllers".
        topics: name → topic, from `camera_topic` or `controller_topic`.
        namespace: of the node, for topics without a leading slash.
    """
    owners: dict[str, str] = {}
    for name, topic in topics.items():
        where = f"parameter '{key}.{name}.topic'"
        if len(topic) > MAX_TOPIC_CHARS:
            return f"{where} has {len(topic)} characters, at most {MAX_TOPIC_CHARS} are allowed"
        if not _TOPIC.fullmatch(topic):
            return (
                f"{where}: {topic!r} is no ROS topic name: letters, digits and _, parts separated "
                "by /, no part begins with a digit"
            )
        absolute = topic if topic.startswith(("/", "~")) else f"{namespace.rstrip('/')}/{topic}"
        if absolute in owners:
            return (
                f"{where}: {absolute!r} is the topic of {owners[absolute]!r} already; "
                "each needs one of its own"
            )
        owners[absolute] = name
    return ""
