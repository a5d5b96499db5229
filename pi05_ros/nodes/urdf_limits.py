"""The robot's joints with their limits: the parameters', or what a URDF leaves of them."""

from __future__ import annotations

from rclpy.node import Node
from rclpy.wait_for_message import wait_for_message
from std_msgs.msg import String

from pi05_ros.config import LimitsParameters, ParameterError
from pi05_ros.control.urdf_limits import UrdfError, read_urdf_limits, tightened
from pi05_ros.nodes.messages import LATCHED_QOS
from pi05_ros.types import JointGroup


def limited(node: Node, limits: LimitsParameters, joints: JointGroup) -> JointGroup:
    """`joints` with the limits that `limits.*` asks for; may be called within a callback.

    Raises:
        ParameterError: no URDF comes in time, or it does not fit the joints.
    """
    if limits.source == "params":
        return joints
    topic = node.resolve_topic_name(limits.topic)
    came, message = wait_for_message(
        String, node, topic, qos_profile=LATCHED_QOS, time_to_wait=limits.timeout_s
    )
    if not came or message is None:
        raise ParameterError(
            f"limits.source is urdf, but no URDF came on {topic} within {limits.timeout_s:g} s: "
            "is robot_state_publisher running? Else set limits.source to params"
        )
    try:
        tight = tightened(joints, read_urdf_limits(message.data, joints.names))
    except UrdfError as error:
        raise ParameterError(f"limits.source urdf, {topic}: {error}") from None
    pairs = zip(joints.joints, tight.joints, strict=True)
    narrower = [before.name for before, after in pairs if before != after]
    node.get_logger().info(f"limits: {topic} narrows {', '.join(narrower) or 'no joint'}")
    return tight
