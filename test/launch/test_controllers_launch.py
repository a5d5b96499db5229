"""What reaches the hardware through the real joint_trajectory_controller keeps the limits.

controller_manager runs mock hardware with config/controllers.yaml; the policy node gets random
images and a new instruction every 3 s, for 30 s. The positions on the controllers' command
interfaces, which `controller_state` reports as `output`, are checked against config/aloha.yaml.

Runs under `colcon test` where ros2_controllers is installed (`launch_test
test/launch/test_controllers_launch.py` by hand). Pins: steps at a message that the controller
bridges, trajectories that it refuses, a config/controllers.yaml that does not load.
"""

import os
import time
import unittest

import launch_testing.actions
import launch_testing.asserts
import numpy as np
import pytest
import rclpy
import yaml
from ament_index_python.packages import get_package_share_directory
from control_msgs.msg import JointTrajectoryControllerState
from launch import LaunchDescription
from launch_ros.actions import LifecycleNode, Node
from rcl_interfaces.msg import Log
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String

from pi05_ros.msg import PolicyStatus

CONFIG = os.path.join(get_package_share_directory("pi05_ros"), "config")
ALOHA = os.path.join(CONFIG, "aloha.yaml")
CONTROLLERS = os.path.join(CONFIG, "controllers.yaml")
ARMS = ("left_arm_controller", "right_arm_controller")
STARTUP_S = 120.0
MOTION_S = 30.0
INSTRUCTION_S = 3.0
CAMERA_S = 0.05
INSTRUCTIONS = (
    "touch the red cube with the left arm",
    "touch the blue cube with the right arm",
    "push the green cube with the left arm",
)
# Times are the controller's own, so what is left is the clock's resolution and that of the period.
VELOCITY_SHARE = 1.05
ACCELERATION_SHARE = 1.5


def policy_parameters():
    with open(ALOHA) as file:
        return yaml.safe_load(file)["/**/policy"]["ros__parameters"]


def robot_description():
    """URDF of the joints of config/aloha.yaml in a chain, all with mock hardware."""
    joints = policy_parameters()["joints"]
    parts, interfaces, parent = ['<link name="world"/>'], [], "world"
    for name in joints["names"]:
        limits = joints[name]
        kind = "prismatic" if limits.get("gripper") else "revolute"
        middle = (limits["lower"] + limits["upper"]) / 2
        parts.append(
            f'<link name="{name}_link"/><joint name="{name}" type="{kind}">'
            f'<parent link="{parent}"/><child link="{name}_link"/><axis xyz="0 0 1"/>'
            f'<limit lower="{limits["lower"]}" upper="{limits["upper"]}" effort="100" '
            f'velocity="{2 * limits["max_velocity"]}"/></joint>'
        )
        interfaces.append(
            f'<joint name="{name}"><command_interface name="position"/>'
            f'<state_interface name="position"><param name="initial_value">{middle}</param>'
            "</state_interface></joint>"
        )
        parent = f"{name}_link"
    return (
        f'<?xml version="1.0"?><robot name="aloha">{"".join(parts)}'
        '<ros2_control name="mock" type="system"><hardware>'
        "<plugin>mock_components/GenericSystem</plugin></hardware>"
        f"{''.join(interfaces)}</ros2_control></robot>"
    )


@pytest.mark.launch_test
def generate_test_description():
    """controller_manager with mock hardware, its controllers, and the policy node."""
    policy = LifecycleNode(
        package="pi05_ros",
        executable="policy_node",
        name="policy",
        namespace="",
        # A runner's few cores also compute the network: messages may be later than on a robot.
        parameters=[ALOHA, {"autostart": True, "lead_s": 0.1}],
        output="both",
    )
    nodes = [
        Node(
            package="robot_state_publisher",
            executable="robot_state_publisher",
            parameters=[{"robot_description": robot_description()}],
        ),
        Node(
            package="controller_manager",
            executable="ros2_control_node",
            parameters=[CONTROLLERS],
            output="both",
        ),
        Node(
            package="controller_manager",
            executable="spawner",
            arguments=["joint_state_broadcaster", *ARMS, "--param-file", CONTROLLERS],
            output="both",
        ),
        policy,
    ]
    description = LaunchDescription([*nodes, launch_testing.actions.ReadyToTest()])
    return description, {"policy": policy}


class TestTheHardwareGetsLimitedCommands(unittest.TestCase):
    """While the nodes run."""

    def setUp(self):
        rclpy.init()
        self.node = rclpy.create_node("launch_test")
        self.state = PolicyStatus.UNCONFIGURED
        self.commands = {arm: ([], []) for arm in ARMS}
        self.joints = {}
        self.errors = []
        self.random = np.random.default_rng(0)
        subscribe = self.node.create_subscription
        subscribe(PolicyStatus, "policy/status", self.on_status, 10)
        subscribe(Log, "/rosout", self.on_log, 1000)
        for arm in ARMS:
            subscribe(
                JointTrajectoryControllerState,
                f"{arm}/controller_state",
                lambda message, arm=arm: self.on_controller_state(arm, message),
                1000,
            )
        cameras = policy_parameters()["cameras"]
        self.cameras = [
            self.node.create_publisher(Image, cameras[name]["topic"], qos_profile_sensor_data)
            for name in cameras["names"]
        ]
        self.instruction = self.node.create_publisher(String, "instruction", 10)
        self.node.create_timer(CAMERA_S, self.publish_images)

    def tearDown(self):
        self.node.destroy_node()
        rclpy.shutdown()

    def on_status(self, message):
        self.state = message.state

    def on_log(self, message):
        if message.level >= 40 and message.name.split(".")[0] in ARMS:
            self.errors.append(message.msg)

    def on_controller_state(self, arm, message):
        self.joints[arm] = list(message.joint_names)
        if len(message.output.positions) == len(message.joint_names):
            stamps, positions = self.commands[arm]
            stamps.append(message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec)
            positions.append(list(message.output.positions))

    def publish_images(self):
        """Noise, so that no frame equals the one before."""
        for publisher in self.cameras:
            message = Image(height=96, width=128, step=3 * 128, encoding="rgb8")
            message.header.stamp = self.node.get_clock().now().to_msg()
            message.data = self.random.bytes(96 * 3 * 128)
            publisher.publish(message)

    def spin_for(self, seconds, condition=lambda: False):
        deadline_s = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline_s:
            rclpy.spin_once(self.node, timeout_sec=0.1)
        return condition()

    def test_commands(self):
        ready = self.spin_for(
            STARTUP_S,
            lambda: self.state == PolicyStatus.ACTIVE and len(self.joints) == len(ARMS),
        )
        self.assertTrue(ready, "the policy node and the controllers did not become active")
        for k in range(round(MOTION_S / INSTRUCTION_S)):
            self.instruction.publish(String(data=INSTRUCTIONS[k % len(INSTRUCTIONS)]))
            self.spin_for(INSTRUCTION_S)
        self.assertEqual(self.errors, [], "a controller reported errors")
        for arm in ARMS:
            self.check(arm)

    def check(self, arm):
        limits = [policy_parameters()["joints"][name] for name in self.joints[arm]]
        top_speed = np.array([limit["max_velocity"] for limit in limits])
        top_acceleration = np.array([limit["max_acceleration"] for limit in limits])
        stamps, positions = (np.array(values) for values in self.commands[arm])
        fresh = np.r_[True, np.diff(stamps) > 0]
        stamps, positions = stamps[fresh], positions[fresh]
        self.assertGreater(len(stamps), 1000, f"{arm}: too few states to judge")
        self.assertGreater(np.ptp(positions, axis=0).max(), 0.05, f"{arm}: no joint moved")
        # States may be missing: differences are taken over the time that they are apart.
        steps = np.diff(stamps)[:, None]
        velocities = np.diff(positions, axis=0) / steps
        accelerations = np.diff(velocities, axis=0) / ((steps[1:] + steps[:-1]) / 2)
        speed = (np.abs(velocities) / top_speed).max(axis=0)
        self.assertLess(speed.max(), VELOCITY_SHARE, f"{arm}: shares of max_velocity {speed}")
        hard = (np.abs(accelerations) / top_acceleration).max(axis=0)
        self.assertLess(hard.max(), ACCELERATION_SHARE, f"{arm}: of max_acceleration {hard}")
        for values, limit in zip(positions.T, limits, strict=True):
            self.assertGreaterEqual(values.min(), limit["lower"] - 1e-6, arm)
            self.assertLessEqual(values.max(), limit["upper"] + 1e-6, arm)


@launch_testing.post_shutdown_test()
class TestShutdown(unittest.TestCase):
    """After the nodes were interrupted."""

    def test_exit_code(self, proc_info, policy):
        launch_testing.asserts.assertExitCodes(proc_info, process=policy)
