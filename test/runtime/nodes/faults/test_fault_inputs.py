"""Inputs that must not be used, injected through the running node's topics."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_steps import (
    LEFT,
    level,
    moved,
    quiet,
    shows,
    start,
    start_moving,
    starts_at,
    value,
)
from harness import (
    HOME,
    NodeProcess,
    Peer,
    arrays,
    check_limits,
    default_image,
    default_joints,
)
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.msg import PolicyStatus

pytestmark = pytest.mark.slow


def test_incompatible_qos_is_named(peer: Peer, process: NodeProcess) -> None:
    """Promise 15. Pins: an instruction that never arrives, without a problem in the status."""
    start_moving(peer)
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    topic = f"{LEFT}/joint_trajectory"
    publisher = peer.node.create_publisher(String, "instruction", best_effort)
    subscription = peer.node.create_subscription(JointTrajectory, topic, lambda _: None, latched)
    try:
        peer.wait(lambda: shows(peer, "topic /instruction: a publisher"), "mismatch of the input")
        peer.wait(lambda: shows(peer, f"topic /{topic}: a subscriber"), "mismatch of the output")
        assert shows(peer, "policy RELIABILITY") and shows(peer, "policy DURABILITY")
        assert "RELIABILITY" in process.log
        peer.wait(lambda: level(peer, "topics") == DiagnosticStatus.ERROR, "error of the topics")
    finally:
        peer.destroy(peer.node.destroy_publisher, publisher)
        peer.destroy(peer.node.destroy_subscription, subscription)
    peer.wait(lambda: not shows(peer, "incompatible QoS"), "end of the mismatch")


def shifted(camera: str, stamp_s: float) -> Image:
    return default_image(camera, stamp_s - (0.12 if camera == "cam_high" else 0.0))


def future(camera: str, stamp_s: float) -> Image:
    return default_image(camera, stamp_s + 3.0)


def permuted(positions: np.ndarray, stamp_s: float) -> JointState:
    message = default_joints(positions[::-1], stamp_s)
    message.name = message.name[::-1]
    return message


def doubled(positions: np.ndarray, stamp_s: float) -> JointState:
    message = default_joints(positions, stamp_s)
    message.name = [*message.name[:-1], message.name[0]]
    return message


def partial(positions: np.ndarray, stamp_s: float) -> JointState:
    message = default_joints(positions, stamp_s)
    message.name, message.position = message.name[:-1], message.position[:-1]
    return message


def without_positions(positions: np.ndarray, stamp_s: float) -> JointState:
    message = default_joints(positions, stamp_s)
    message.position = []
    return message


def broken_encoder(positions: np.ndarray, stamp_s: float) -> JointState:
    message = default_joints(positions, stamp_s)
    message.position[3] = float("nan")
    return message


def old(positions: np.ndarray, stamp_s: float) -> JointState:
    return default_joints(positions, stamp_s - 0.3)


@pytest.mark.parametrize("what", ["cameras", "joints"])
def test_inputs_that_must_not_be_used_stop_inference(peer: Peer, what: str) -> None:
    """Promises 1 to 3. Pins: an inference on inputs that do not belong together."""
    faults: dict[str, list[tuple[Callable[..., object], str]]] = {
        "cameras": [(shifted, "s apart, limit 0.050"), (future, "s in the future")],
        "joints": [
            (doubled, "given twice"),
            (partial, "'right_gripper' is missing"),
            (without_positions, "must publish positions"),
            (broken_encoder, "not a finite number"),
            (old, "joint positions: newest is"),
        ],
    }
    start_moving(peer)
    for make, words in faults[what]:
        setattr(peer, "make_image" if what == "cameras" else "make_joints", make)
        peer.wait(lambda: shows(peer, words), f"problem {words!r}")  # noqa: B023
        time.sleep(0.1)
        peer.chunks.clear()
        time.sleep(0.2)
        assert not peer.chunks, words
        peer.make_image, peer.make_joints = default_image, default_joints
        peer.wait(lambda: peer.chunks, f"chunk after {words!r}")
        # an earlier status would show the next fault's problem too early
        assert peer.fresh_status().state == PolicyStatus.ACTIVE
    if what == "joints":
        assert value(peer, "joints", "refused") > 0


def test_joints_are_matched_by_name(peer: Peer) -> None:
    """Promise 3. Pins: positions taken in the order in which the driver happens to send them."""
    peer.make_joints = permuted
    start(peer)
    starts_at(peer, HOME)


def test_a_stopped_stream_is_a_warning_and_then_an_error(peer: Peer) -> None:
    """Promises 1 and 3."""
    start_moving(peer)
    peer.cameras, peer.publish_joints = ("cam_high", "cam_left_wrist"), False
    for expected in (DiagnosticStatus.WARN, DiagnosticStatus.ERROR):
        for part in ("camera cam_right_wrist", "joints"):
            peer.wait(lambda: level(peer, part) == expected, f"{part} at level {expected!r}")  # noqa: B023
    assert quiet(peer)
    peer.run_robot()
    peer.wait(lambda: level(peer, "joints") == DiagnosticStatus.OK, "end of the error")


def test_an_image_that_changes_in_mid_stream(peer: Peer) -> None:
    """Promise 14. Pins: pixels read by the first frame's size or encoding; a bad one that kills."""

    def grey(camera: str, stamp_s: float) -> Image:
        image = default_image(camera, stamp_s)
        image.height, image.width, image.step, image.encoding = 30, 50, 50, "mono8"
        image.data = image.data[:1500]
        return image

    def cut_short(camera: str, stamp_s: float) -> Image:
        image = default_image(camera, stamp_s)
        image.data = image.data[:100]
        return image

    start_moving(peer)
    peer.make_image = cut_short
    peer.wait(lambda: peer.statuses[-1].inference_failures > 4, "damaged images")
    assert peer.statuses[-1].state == PolicyStatus.ACTIVE
    peer.chunks.clear()
    peer.make_image = grey
    peer.wait(lambda: len(peer.chunks) > 2, "chunks from valid images")
    camera = peer.wait(
        lambda: (
            level(peer, "camera cam_high") == DiagnosticStatus.WARN
            and "size changed" in peer.diagnostics["policy: camera cam_high"].message
            and peer.diagnostics["policy: camera cam_high"]
        ),
        "warning of the camera",
    )
    assert "size changed from 64 × 48 to 50 × 30" in camera.message


class SimulatedTime:
    """A clock that can be set."""

    def __init__(self) -> None:
        self._offset_s = 100.0 - time.monotonic()
        self.frozen_s: float | None = None

    def __call__(self) -> float:
        return self.frozen_s or time.monotonic() + self._offset_s

    def jump(self, seconds: float) -> None:
        self._offset_s += seconds


def test_a_clock_that_jumps_starts_over(peer: Peer, process: NodeProcess) -> None:
    """Promise 16. Pins: a bag that loops into trajectories of the future, a node that is dumb
    while /clock stands."""
    assert peer.set_parameter("policy", "use_sim_time", True).successful
    peer.clock_s = clock = SimulatedTime()
    try:
        start_moving(peer)
        for seconds, words in ((-20.0, r"clock went -(19|20)\."), (30.0, r"clock went \+30\.")):
            peer.positions = peer.positions + 0.01
            time.sleep(0.2)
            clock.jump(seconds)
            peer.wait(lambda: re.search(words, process.log), "notice")  # noqa: B023
            peer.reset()
            starts_at(peer, peer.positions)
            stamp_s = arrays(peer.trajectories[LEFT][0])[0]
            assert abs(stamp_s - clock()) < 1.0
        clock.frozen_s = clock()
        time.sleep(0.2)
        assert quiet(peer)
        assert peer.fresh_status().state == PolicyStatus.ACTIVE
        clock.frozen_s = None
        peer.reset()
        peer.wait(lambda: moved(peer), "motion when the clock runs again")
    finally:
        peer.change_state("deactivate")
        peer.clock_s = None
        assert peer.set_parameter("policy", "use_sim_time", False).successful


def test_an_instruction_changes_in_mid_chunk(peer: Peer) -> None:
    """Promise 9. Pins: a chunk of the old instruction after one of the new."""
    start_moving(peer)
    peer.chunks.clear()
    peer.instruct("sweep back")
    peer.wait(lambda: sum(c.instruction == "sweep back" for c in peer.chunks) > 3, "chunks of it")
    order = [chunk.instruction for chunk in peer.chunks]
    assert set(order[order.index("sweep back") :]) == {"sweep back"}
    reaction_s = peer.wait(
        lambda: value(peer, "executor", "reaction to instruction s"), "reaction time"
    )
    assert 0 < reaction_s < 1.0
    for text in ("", "x" * 301, "drop\x07 it"):
        peer.instruct(text)
    time.sleep(0.2)
    assert peer.fresh_status().instruction == "sweep back"


@pytest.mark.parametrize(
    ("topic", "message_type"),
    [("cam_high/image_raw", Image), ("joint_states", JointState), ("instruction", String)],
)
def test_bytes_that_are_no_message_change_nothing(
    peer: Peer, topic: str, message_type: type
) -> None:
    """Promise 14. Pins: a participant that writes anything into a topic, and the node ends."""
    start_moving(peer)
    publisher = peer.node.create_publisher(message_type, topic, 10)
    try:
        peer.wait(lambda: publisher.get_subscription_count() > 0, "subscription")
        for size in (0, 1, 4, 5, 12, 13, 100):
            for filling in (b"\0", b"\xff", b"\0\1\0\0", b"\0\0\0\xdb"):
                publisher.publish((filling * size)[:size])
                time.sleep(0.01)
    finally:
        peer.destroy(peer.node.destroy_publisher, publisher)
    peer.chunks.clear()
    peer.wait(lambda: len(peer.chunks) > 2, "chunks afterwards")
    status = peer.fresh_status()
    assert status.state == PolicyStatus.ACTIVE and status.instruction == "sweep"
    check_limits(peer.trajectories[LEFT])
