"""The robot's joints with their limits: the parameters', or what a URDF leaves of them."""

from __future__ import annotations

import queue

from rclpy.node import Node
from std_msgs.msg import String

from pi05_ros.config import LimitsParameters, ParameterError
from pi05_ros.control.urdf_limits import UrdfError, read_urdf_limits, tightened
from pi05_ros.nodes.messages import LATCHED_QOS
from pi05_ros.types import JointGroup


def limited(node: Node, limits: LimitsParameters, joints: JointGroup) -> JointGroup:
    """`joints` with the limits that `limits.*` asks for; waits for the executor's thread.

    Raises:
        ParameterError: no URDF comes in time, or it does not fit the joints.
    """
    if limits.source == "params":
        return joints
    topic = node.resolve_topic_name(limits.topic)
    messages: queue.SimpleQueue[String] = queue.SimpleQueue()
    subscription = node.create_subscription(String, topic, messages.put, LATCHED_QOS)
    try:
        message = messages.get(timeout=limits.timeout_s)
    except queue.Empty:
        raise ParameterError(
            f"limits.source is urdf, but no URDF came on {topic} within {limits.timeout_s:g} s: "
            "is robot_state_publisher running? Else set limits.source to params"
        ) from None
    finally:
        node.destroy_subscription(subscription)
    try:
        tight = tightened(joints, read_urdf_limits(message.data, joints.names))
    except UrdfError as error:
        raise ParameterError(f"limits.source urdf, {topic}: {error}") from None
    pairs = zip(joints.joints, tight.joints, strict=True)
    narrower = [before.name for before, after in pairs if before != after]
    node.get_logger().info(f"limits: {topic} narrows {', '.join(narrower) or 'no joint'}")
    return tight
