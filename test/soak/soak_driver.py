"""A second driver for the soak: a publisher on `joint_states` until it is killed."""

from __future__ import annotations

from pi05_ros.nodes.main import prepare


def main() -> None:
    prepare()
    import rclpy
    from sensor_msgs.msg import JointState

    rclpy.init()
    node = rclpy.create_node("second_driver")
    node.create_publisher(JointState, "joint_states", 10)
    rclpy.spin(node)


if __name__ == "__main__":
    main()
