"""ROS 2 nodes: wiring only. The one room that imports rclpy and message packages."""
