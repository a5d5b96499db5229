"""ROS 2 nodes: wiring only. The one package that imports rclpy and message packages."""

EXIT_BAD_START = 2
"""Exit code: an argument or a parameter is wrong, the same command would fail again."""
EXIT_DEVICE = 70
"""Exit code: a device error that only a new process recovers from; the launch file starts one."""
