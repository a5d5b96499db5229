"""The policy node as a process, through the real middleware."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from harness import (
    CAMERAS,
    CONTROLLERS,
    JOINTS,
    NodeProcess,
    Peer,
    default_image,
    unconfigured,
)
from sensor_msgs.msg import CompressedImage, Image

from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.messages import IMAGE_QOS, to_seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    log = tmp_path_factory.mktemp("policy_node") / "policy_node.log"
    process = NodeProcess("policy_node", log, "-p", "status_rate_hz:=10.0", "-p", "seed:=3")
    yield process
    process.stop()


@pytest.fixture()
def peer(process: NodeProcess, shared_peer: Peer) -> Iterator[Peer]:
    with unconfigured(shared_peer, process) as peer:
        yield peer


def moved(peer: Peer) -> bool:
    return all(peer.trajectories[name] for name in CONTROLLERS)


def test_an_instruction_becomes_trajectories(peer: Peer, process: NodeProcess) -> None:
    """Pins: no motion before the instruction, and none after deactivation."""
    assert peer.change_state("configure"), process.log
    status = peer.fresh_status()
    assert status.state == PolicyStatus.INACTIVE
    assert "π0.5" in status.policy
    assert any("cam_high" in problem for problem in status.problems)

    peer.run_robot()
    assert peer.change_state("activate")
    peer.wait(
        lambda: peer.statuses[-1].problems == ["instruction: none given"], "ready but for the task"
    )
    assert not moved(peer)
    peer.instruct("")
    peer.wait(lambda: "instruction refused" in process.log, "refusal of the empty instruction")
    assert not moved(peer)

    peer.instruct("  wave with the left arm ")
    peer.wait(lambda: moved(peer), "trajectory")
    peer.wait(lambda: peer.chunks, "chunk")
    assert peer.active_instructions[-1] == "wave with the left arm"

    first = peer.trajectories["left_arm_controller"][0]
    assert list(first.joint_names) == list(JOINTS[:7])
    assert np.allclose(first.points[0].positions, peer.positions[:7], atol=0.02)
    for name in CONTROLLERS:
        for trajectory in peer.trajectories[name]:
            assert np.allclose(trajectory.points[-1].velocities, 0.0)
            times = [to_seconds(point.time_from_start) for point in trajectory.points]
            assert all(a < b for a, b in pairwise(times))
    chunk = peer.chunks[0]
    assert list(chunk.joint_names) == list(JOINTS)
    assert len(chunk.positions) == chunk.horizon * len(JOINTS)
    assert chunk.latency_s > 0
    assert chunk.instruction == "wave with the left arm"

    status = peer.fresh_status()
    assert status.state == PolicyStatus.ACTIVE
    assert status.inference_failures == 0
    assert min(status.frames_received) > 0
    # a machine under load may hold frames back for longer than the gate once in a while
    peer.wait(lambda: peer.statuses[-1].problems == [], "status without problems")

    assert peer.change_state("deactivate")
    time.sleep(0.3)
    peer.reset()
    time.sleep(0.5)
    assert not moved(peer)


def test_a_stopped_camera_stops_inference(peer: Peer, process: NodeProcess) -> None:
    """Pins: inference on the last image of a camera that is gone."""
    assert peer.change_state("configure"), process.log
    peer.run_robot()
    assert peer.change_state("activate")
    peer.instruct("wave with the left arm")
    peer.wait(lambda: moved(peer), "trajectory")
    peer.cameras = ("cam_high", "cam_left_wrist")
    peer.wait(
        lambda: any("cam_right_wrist" in problem for problem in peer.statuses[-1].problems),
        "problem that names the camera",
    )
    time.sleep(1.5)  # longer than the horizon
    # a busy peer receives late what was sent before
    since_s = peer.node.get_clock().now().nanoseconds * 1e-9
    time.sleep(0.5)
    for chunk in peer.chunks:
        assert to_seconds(chunk.header.stamp) + chunk.latency_s < since_s
    for name in CONTROLLERS:
        for trajectory in peer.trajectories[name]:
            if to_seconds(trajectory.header.stamp) > since_s:
                assert all(np.allclose(point.velocities, 0.0) for point in trajectory.points)
    peer.reset()
    peer.run_robot()
    peer.wait(lambda: peer.chunks, "chunk after the camera came back")


def test_the_scheduler_changes_in_motion(peer: Peer, process: NodeProcess) -> None:
    """Pins: a method that is read once, or a wrong one that stops the node."""
    assert peer.change_state("configure"), process.log
    peer.run_robot()
    assert peer.change_state("activate")
    peer.instruct("wave with the left arm")
    peer.wait(lambda: moved(peer), "trajectory")
    try:
        for method in ("rtc", "blend", "sync", "latest"):
            assert peer.set_parameter("policy", "scheduler.method", method).successful
            peer.reset()
            peer.wait(lambda: moved(peer) and peer.chunks, f"motion under {method}")
            peer.wait(lambda: peer.statuses and peer.statuses[-1].scheduler == method, method)  # noqa: B023
        refused = peer.set_parameter("policy", "scheduler.method", "newest")
        assert not refused.successful and "temporal_ensemble" in refused.reason
        assert peer.fresh_status().inference_failures == 0
    finally:
        peer.set_parameter("policy", "scheduler.method", "temporal_ensemble")


def test_images_of_another_size_and_encoding_are_used(peer: Peer, process: NodeProcess) -> None:
    def grey(camera: str, stamp_s: float) -> Image:
        image = default_image(camera, stamp_s)
        image.height, image.width, image.step, image.encoding = 30, 50, 50, "mono8"
        image.data = image.data[:1500]
        return image

    peer.make_image = grey
    assert peer.change_state("configure"), process.log
    peer.run_robot()
    assert peer.change_state("activate")
    peer.instruct("wave with the left arm")
    peer.wait(lambda: moved(peer), "trajectory")


def test_compressed_images_are_used(peer: Peer, process: NodeProcess) -> None:
    """Pins: a transport parameter that changes the topic and not the message type."""
    assert peer.change_state("configure"), process.log  # declares the cameras' parameters
    assert peer.change_state("cleanup")
    names = [f"cameras.{camera}.transport" for camera in CAMERAS]
    for name in names:
        assert peer.set_parameter("policy", name, "compressed").successful
    publishers = [
        peer.node.create_publisher(CompressedImage, f"{camera}/image_raw/compressed", IMAGE_QOS)
        for camera in CAMERAS
    ]
    _, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 127, np.uint8))

    def publish() -> None:
        message = CompressedImage(format="rgb8; jpeg compressed bgr8", data=jpeg.tobytes())
        message.header.stamp = peer.node.get_clock().now().to_msg()
        for publisher in publishers:
            publisher.publish(message)

    timer = peer.node.create_timer(1 / 30, publish)
    try:
        assert peer.change_state("configure"), process.log
        peer.publish_joints = True
        assert peer.change_state("activate")
        peer.instruct("wave with the left arm")
        peer.wait(lambda: moved(peer), "trajectory")
        assert peer.fresh_status().inference_failures == 0
    finally:
        peer.destroy(peer.node.destroy_timer, timer)
        assert peer.change_state("deactivate") and peer.change_state("cleanup")
        for name in names:
            assert peer.set_parameter("policy", name, "raw").successful
        for publisher in publishers:
            peer.destroy(peer.node.destroy_publisher, publisher)


def test_diagnostics_have_one_status_per_part(peer: Peer, process: NodeProcess) -> None:
    assert peer.change_state("configure"), process.log
    peer.cameras, peer.publish_joints = ("cam_high", "cam_left_wrist"), True

    def level(part: str) -> bytes:
        status = peer.diagnostics.get(f"policy: {part}")
        return status.level if status else b""

    silent = "camera cam_right_wrist"
    peer.wait(lambda: level(silent) == DiagnosticStatus.WARN, "warning of the silent camera")
    peer.wait(lambda: level("camera cam_high") == DiagnosticStatus.OK, "camera that is fine")
    peer.wait(lambda: level(silent) == DiagnosticStatus.ERROR, "error of the silent camera")
    latest = peer.diagnostics
    assert "cam_right_wrist" in latest[f"policy: {silent}"].message
    assert {status.hardware_id for status in latest.values() if "policy" in status.name} == {
        "aloha"
    }
    expected = {
        "node": "stopped",
        "camera cam_high": "lost",
        "joints": "age s",
        "executor": "latency p99 s",
        "scheduler": "horizon left s",
        "limits": "left_waist",
        "controllers": "left_arm_controller/joint_trajectory subscribers",
    }
    for part, key in expected.items():
        assert key in {value.key for value in latest[f"policy: {part}"].values}
    assert level("instruction") == DiagnosticStatus.WARN
    assert level("topics") == DiagnosticStatus.OK


def test_undecodable_images_are_named_and_move_nothing(peer: Peer, process: NodeProcess) -> None:
    def broken(camera: str, stamp_s: float) -> Image:
        image = default_image(camera, stamp_s)
        if camera == "cam_left_wrist":
            image.encoding = "32FC1"
        return image

    peer.make_image = broken
    assert peer.change_state("configure"), process.log
    peer.run_robot()
    assert peer.change_state("activate")
    peer.instruct("wave with the left arm")
    peer.wait(lambda: "32FC1" in process.log, "named encoding")
    assert "cam_left_wrist" in process.log
    status = peer.wait(
        lambda: peer.statuses[-1].inference_failures and peer.statuses[-1], "counted failure"
    )
    assert status.inferences == 0
    assert not moved(peer)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("checkpoint", "/no/such/folder", "/no/such/folder"),
        ("cameras.names", ["cam_high", "cam_lwo"], "cam_lwo"),
        ("robot", "r2d2", "r2d2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    peer: Peer, process: NodeProcess, name: str, value: object, message: str
) -> None:
    """Pins: a node that starts with other values than the given ones."""
    before = {"checkpoint": "small", "robot": "aloha"}.get(
        name, ["cam_high", "cam_left_wrist", "cam_right_wrist"]
    )
    peer.wait(lambda: peer.statuses, "status", 60.0)
    if name == "cameras.names":  # declared at the first configure
        assert peer.change_state("configure")
        assert peer.change_state("cleanup")
    said = len(process.log)
    assert peer.set_parameter("policy", name, value).successful
    try:
        assert not peer.change_state("configure")
    finally:
        assert peer.set_parameter("policy", name, before).successful
    peer.wait(lambda: message in process.log[said:], "line that names it")
    lines = [line for line in process.log[said:].splitlines() if "configure:" in line]
    assert len(lines) == 1
    assert "Traceback" not in process.log
    assert peer.fresh_status().state == PolicyStatus.UNCONFIGURED


def test_unknown_parameters_are_refused(tmp_path: Path, shared_peer: Peer) -> None:
    """Pins: a typing error in a params file that silently leaves the default; a node that was to
    start by itself, cannot, and stays.
    """
    process = NodeProcess(
        *("policy_node", tmp_path / "log", "-r", "__ns:=/typo"),
        *("-p", "autostart:=true", "-p", "max_skwe_s:=0.1"),
    )
    shared_peer.wait(lambda: "max_skwe_s" in process.log, "line that names it", 60.0)
    assert process.wait(20.0) == 2
