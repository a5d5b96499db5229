"""The simulated robot as a process, through the real middleware."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import CONTROLLERS, JOINTS, NodeProcess, Peer
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_lab.sim.arms import SimulatedAloha
from pi05_ros.nodes.messages import IMAGE_QOS, TRAJECTORY_QOS, to_seconds, trajectory_message

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 160, 120


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    log = tmp_path_factory.mktemp("sim") / "aloha_sim_node.log"
    process = NodeProcess(
        *("aloha_sim_node", log, "-p", f"width:={WIDTH}", "-p", f"height:={HEIGHT}"),
        *("-p", "camera_rate_hz:=15.0"),
    )
    yield process
    assert process.stop() == 0


class Robot:
    """What the simulator published."""

    def __init__(self, peer: Peer) -> None:
        node: Node = peer.node
        self.peer = peer
        self.images: dict[str, Image] = {}
        self.frames = 0
        self.joints: JointState | None = None
        node.create_subscription(JointState, "joint_states", self._on_joints, 10)
        for name in ("cam_high", "cam_left_wrist", "cam_right_wrist"):
            node.create_subscription(Image, f"{name}/image_raw", self._on_image, IMAGE_QOS)
        self.publishers = {
            name: node.create_publisher(JointTrajectory, f"{name}/joint_trajectory", TRAJECTORY_QOS)
            for name in CONTROLLERS
        }
        self.reset = node.create_client(Trigger, "aloha_sim/reset")
        self.set_qpos = node.create_publisher(Float64MultiArray, "aloha_sim/set_qpos", 10)

    def _on_joints(self, message: JointState) -> None:
        self.joints = message

    def _on_image(self, message: Image) -> None:
        self.images[message.header.frame_id] = message
        self.frames += 1

    def positions(self) -> np.ndarray:
        assert self.joints is not None
        return np.array(self.joints.position)

    def move(self, controller: str, positions: np.ndarray, duration_s: float) -> None:
        columns = slice(0, 7) if controller.startswith("left") else slice(7, 14)
        now_s = self.peer.node.get_clock().now().nanoseconds * 1e-9
        message = trajectory_message(
            JOINTS[columns],
            now_s,
            np.array([duration_s]),
            positions[None, columns],
            np.zeros((1, 7)),
        )
        self.publishers[controller].publish(message)


@pytest.fixture(scope="module")
def robot(process: NodeProcess) -> Iterator[Robot]:
    peer = Peer()
    robot = Robot(peer)
    peer.wait(lambda: robot.joints is not None, f"joint state: {process.log}", 60.0)
    peer.wait(lambda: len(robot.images) == 3, f"pictures: {process.log}", 60.0)
    yield robot
    peer.close()


def test_it_publishes_what_a_robot_would(robot: Robot) -> None:
    assert robot.joints is not None
    assert list(robot.joints.name) == list(JOINTS)
    image = robot.images["cam_high"]
    assert (image.width, image.height, image.encoding) == (WIDTH, HEIGHT, "rgb8")
    pixels = np.frombuffer(bytes(image.data), np.uint8)
    assert pixels.std() > 10  # not an empty picture
    now_s = robot.peer.node.get_clock().now().nanoseconds * 1e-9
    assert abs(now_s - to_seconds(image.header.stamp)) < 2.0


def test_it_follows_a_trajectory_and_resets(robot: Robot) -> None:
    home = robot.positions()
    goal = home.copy()
    goal[0] += 0.3
    goal[9] -= 0.2
    for controller in CONTROLLERS:
        robot.peer.wait(
            lambda c=controller: robot.publishers[c].get_subscription_count() > 0, "controller"
        )
        robot.move(controller, goal, 0.5)
    robot.peer.wait(lambda: np.abs(robot.positions() - goal).max() < 0.02, "arrival")
    future = robot.reset.call_async(Trigger.Request())
    robot.peer.wait(future.done, "reset")
    assert future.result().success
    robot.peer.wait(lambda: np.abs(robot.positions() - home).max() < 0.02, "way home")


def test_it_goes_on_from_a_given_state(robot: Robot, process: NodeProcess) -> None:
    """Fault: servos that pull the arms back to where they were; nonsense that ends the node."""
    sim = SimulatedAloha()
    sim.reset(5)
    home = sim.positions()
    wanted = home.copy()
    wanted[[0, 8]] += 0.2, 0.1
    sim.set_targets(wanted)
    sim.step(400)
    robot.peer.wait(lambda: robot.set_qpos.get_subscription_count() > 0, "subscription")
    robot.set_qpos.publish(Float64MultiArray(data=sim.qpos().tolist()))
    robot.peer.wait(lambda: np.abs(robot.positions() - sim.positions()).max() < 0.01, "the state")
    for nonsense in ([1.0, 2.0], [float("nan")] * len(sim.qpos())):
        robot.set_qpos.publish(Float64MultiArray(data=nonsense))
    robot.peer.wait(lambda: process.log.count("~/set_qpos: qpos must be") == 2, "refusals")
    assert np.abs(robot.positions() - sim.positions()).max() < 0.01
    future = robot.reset.call_async(Trigger.Request())
    robot.peer.wait(future.done, "reset")
    robot.peer.wait(lambda: np.abs(robot.positions() - home).max() < 0.02, "home again")


def test_a_bad_trajectory_is_rejected_with_its_reason(robot: Robot, process: NodeProcess) -> None:
    """Pins: a rejected message that takes the node down, or moves the arm."""
    before = robot.positions()
    message = trajectory_message(
        JOINTS[:6], 0.0, np.array([0.1]), np.ones((1, 6)), np.zeros((1, 6))
    )
    robot.publishers["left_arm_controller"].publish(message)
    robot.peer.wait(lambda: "rejected a trajectory" in process.log, "rejection")
    assert np.abs(robot.positions() - before).max() < 0.02


def test_the_clock_is_advertised_with_publish_clock_alone(robot: Robot, tmp_path: Path) -> None:
    """Pins: `/clock` advertised by default; nodes with use_sim_time waited for it for ever."""

    def sources() -> set[str]:
        endpoints = robot.peer.node.get_publishers_info_by_topic("/clock")
        return {endpoint.node_name for endpoint in endpoints}

    assert "aloha_sim" not in sources()
    other = NodeProcess(
        *("aloha_sim_node", tmp_path / "other.log", "-p", "publish_clock:=true"),
        *("-r", "__node:=other_sim", "-r", "__ns:=/other"),
    )
    try:
        robot.peer.wait(lambda: "other_sim" in sources(), "/clock")
    finally:
        assert other.stop() == 0


def test_cameras_can_be_switched_off(robot: Robot) -> None:
    assert robot.peer.set_parameter("aloha_sim", "active_cameras", ["cam_high"]).successful
    robot.peer.wait(
        lambda: (
            robot.images["cam_high"].header.stamp.sec
            > robot.images["cam_left_wrist"].header.stamp.sec
        ),
        "camera that stays behind",
    )
    refused = robot.peer.set_parameter("aloha_sim", "active_cameras", ["cam_low"])
    assert not refused.successful
    assert "cam_low" in refused.reason


def test_an_unknown_camera_ends_the_process_with_its_name(tmp_path: Path) -> None:
    process = NodeProcess("aloha_sim_node", tmp_path / "log", "-p", "cameras:=[cam_low]")
    assert process.wait(60.0) == 2
    assert "cam_low" in process.log
    assert "Traceback" not in process.log


def test_missing_opengl_ends_the_process_with_the_remedy(tmp_path: Path) -> None:
    """Pins: a simulator that runs on without cameras, or a traceback from PyOpenGL."""
    process = NodeProcess(
        *("aloha_sim_node", tmp_path / "log", "-r", "__ns:=/blind"), MUJOCO_GL="disable"
    )
    assert process.wait(60.0) == 1
    assert "apt-get install" in process.log
    assert "Traceback" not in process.log
