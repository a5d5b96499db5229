"""The launch file brings up robot and policy, and an instruction sent with `ros2` moves the arms.

Runs under `colcon test` where launch is installed (`launch_test test/launch/test_aloha_launch.py`
by hand). Pins: launch arguments that reach no node, nodes that never become active, and an
instruction QoS that `ros2 topic pub` does not match.
"""

import os
import subprocess
import time
import unittest

import launch_testing.actions
import launch_testing.asserts
import numpy as np
import pytest
import rclpy
from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from sensor_msgs.msg import JointState

from pi05_ros.msg import PolicyStatus

NAMESPACE = "robot"
STARTUP_S = 120.0
MOTION_S = 20.0


@pytest.mark.launch_test
def generate_test_description():
    """The launch file under test, in a namespace."""
    path = os.path.join(get_package_share_directory("pi05_ros"), "launch", "aloha.launch.py")
    aloha = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(path),
        launch_arguments={"namespace": NAMESPACE, "sim": "true"}.items(),
    )
    return LaunchDescription([aloha, launch_testing.actions.ReadyToTest()])


class TestInstructionMovesTheArms(unittest.TestCase):
    """While the nodes run."""

    def setUp(self):
        rclpy.init()
        self.node = rclpy.create_node("launch_test", namespace=NAMESPACE)
        self.state = PolicyStatus.UNCONFIGURED
        self.positions = None
        self.node.create_subscription(PolicyStatus, "policy/status", self.on_status, 10)
        self.node.create_subscription(JointState, "joint_states", self.on_joints, 10)

    def tearDown(self):
        self.node.destroy_node()
        rclpy.shutdown()

    def on_status(self, message):
        self.state = message.state

    def on_joints(self, message):
        self.positions = np.array(message.position)

    def spin_until(self, condition, timeout_s):
        deadline_s = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline_s:
            rclpy.spin_once(self.node, timeout_sec=0.1)
        return condition()

    def test_motion(self):
        ready = self.spin_until(
            lambda: self.state == PolicyStatus.ACTIVE and self.positions is not None, STARTUP_S
        )
        self.assertTrue(ready, "the policy node did not become active")
        before = self.positions
        subprocess.run(
            [
                *("ros2", "topic", "pub", "--times", "5", "--rate", "2"),
                f"/{NAMESPACE}/instruction",
                *("std_msgs/msg/String", "{data: touch the red cube with the left arm}"),
            ],
            check=True,
            timeout=60,
        )
        moved = self.spin_until(lambda: np.abs(self.positions - before).max() > 0.05, MOTION_S)
        self.assertTrue(moved, "no joint moved by 0.05 rad")


@launch_testing.post_shutdown_test()
class TestShutdown(unittest.TestCase):
    """After the nodes were interrupted."""

    def test_exit_codes(self, proc_info):
        launch_testing.asserts.assertExitCodes(proc_info)
