"""Faults injected into the running node through its topics and services.

The policy behind the node is `benchmarks/faulty_policy_node.py`'s, which fails as the instruction
tells it to. docs/reliability.md has the table of promises that these tests hold up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from harness import (
    CONTROLLERS,
    HOME,
    ROOT,
    NodeProcess,
    Peer,
    arrays,
    at_rest,
    check_limits,
    check_seams,
    default_image,
    default_joints,
    limits,
)
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.msg import PolicyStatus

LEFT = CONTROLLERS[0]
HANG_TIMEOUT_S = 0.4


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    process = NodeProcess(
        ROOT / "benchmarks" / "faulty_policy_node.py",
        tmp_path_factory.mktemp("faults") / "policy_node.log",
        *("-p", "checkpoint:=wave", "-p", "status_rate_hz:=10.0"),
        *("-p", f"faults.hang_timeout_s:={HANG_TIMEOUT_S}"),
    )
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def shared_peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture()
def peer(process: NodeProcess, shared_peer: Peer) -> Iterator[Peer]:
    """The node is unconfigured before each test and again after it."""
    peer = shared_peer
    peer.forget()
    peer.wait(lambda: peer.statuses, f"status: {process.log}", 60.0)
    yield peer
    peer.cameras, peer.publish_joints = (), False
    peer.make_image, peer.make_joints = default_image, default_joints
    peer.positions = HOME.copy()
    state = peer.fresh_status().state
    if state == PolicyStatus.ACTIVE:
        assert peer.change_state("deactivate")
    if state in (PolicyStatus.ACTIVE, PolicyStatus.INACTIVE):
        assert peer.change_state("cleanup")


def moved(peer: Peer) -> bool:
    return all(peer.trajectories[name] for name in CONTROLLERS)


def start(peer: Peer, instruction: str = "sweep") -> None:
    assert peer.change_state("configure")
    peer.run_robot()
    peer.instruct(instruction)
    assert peer.change_state("activate")


def start_moving(peer: Peer) -> None:
    start(peer)
    peer.wait(lambda: moved(peer), "trajectory")


def quiet(peer: Peer, seconds: float = 0.3) -> bool:
    """Whether nothing is published; what is under way when it is called does not count."""
    time.sleep(0.15)
    peer.forget()
    time.sleep(seconds)
    return not peer.chunks and not any(peer.trajectories[name] for name in CONTROLLERS)


def tells(peer: Peer, text: str) -> bool:
    return bool(peer.statuses) and any(text in problem for problem in peer.statuses[-1].problems)


def level(peer: Peer, part: str) -> bytes | None:
    status = peer.diagnostics.get(f"policy: {part}")
    return status.level if status else None


def value(peer: Peer, part: str, key: str) -> float:
    """A figure of /diagnostics; 0 before the first."""
    status = peer.diagnostics.get(f"policy: {part}")
    figures = {pair.key: pair.value for pair in status.values} if status else {}
    return float(figures.get(key, 0.0))


def starts_at(peer: Peer, positions: np.ndarray) -> None:
    """The next motion begins where the robot is measured to be."""
    first = peer.wait(lambda: moved(peer) and peer.trajectories[LEFT][0], "trajectory")
    np.testing.assert_allclose(arrays(first)[1][0], positions[:7], atol=5e-3)


def test_stop_is_latched_until_resume(peer: Peer, process: NodeProcess) -> None:
    """Promise 8. Pins: a motion after the stop, an activation that ends it, a resume in mid-air."""
    start_moving(peer)
    assert "~/resume" in peer.trigger("policy/stop")
    time.sleep(0.15)
    for name in CONTROLLERS:
        assert not arrays(peer.trajectories[name][-1])[2][-1].any()
        check_seams(peer.trajectories[name])
    assert quiet(peer)
    assert tells(peer, "stopped: ~/resume ends it")
    assert level(peer, "node") == DiagnosticStatus.WARN
    inferences = peer.statuses[-1].inferences
    assert peer.change_state("deactivate") and peer.change_state("activate")
    assert quiet(peer)
    assert peer.statuses[-1].inferences == inferences
    assert peer.change_state("deactivate") and peer.change_state("cleanup")
    assert peer.change_state("configure") and peer.change_state("activate")
    peer.instruct("sweep")
    assert quiet(peer)
    peer.positions = HOME + 0.02
    time.sleep(0.1)
    peer.trigger("policy/resume")
    starts_at(peer, HOME + 0.02)


def test_speed_zero_comes_to_rest_and_resumes(peer: Peer) -> None:
    """Promise 20. Pins: a jump when the speed changes, a plan that goes on while it is 0."""
    start_moving(peer)
    assert peer.set_parameter("policy", "scheduler.speed_scale", 0.0).successful
    try:
        time.sleep(1.0)
        resting = {name: peer.trajectories[name][-1] for name in CONTROLLERS}
        assert all(at_rest(trajectory) for trajectory in resting.values())
        assert tells(peer, "scheduler.speed_scale is 0")
        peer.chunks.clear()
        time.sleep(0.3)
        assert not peer.chunks
        assert len(peer.trajectories[LEFT]) > 10
        refused = peer.set_parameter("policy", "scheduler.speed_scale", 1.5)
        assert not refused.successful
    finally:
        assert peer.set_parameter("policy", "scheduler.speed_scale", 1.0).successful
    peer.wait(lambda: peer.chunks, "chunk at full speed")
    peer.wait(lambda: not at_rest(peer.trajectories[LEFT][-1]), "motion at full speed")
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])
        check_seams(peer.trajectories[name])


def test_a_hang_is_told_and_outlived(peer: Peer, process: NodeProcess) -> None:
    """Promise 7. Pins: a control loop that waits for the policy, a chunk of long ago that moves."""
    start_moving(peer)
    time.sleep(0.5)
    peer.chunks.clear()
    peer.instruct("fault hang 2")
    peer.wait(lambda: level(peer, "executor") == DiagnosticStatus.ERROR, "error of the executor")
    assert tells(peer, "policy: no answer for")
    peer.wait(lambda: value(peer, "executor", "misses") >= 1, "end of the chunks")
    time.sleep(0.3)
    assert all(at_rest(peer.trajectories[name][-1]) for name in CONTROLLERS)
    ticks = peer.statuses[-1].ticks
    peer.wait(lambda: peer.statuses[-1].ticks > ticks, "control loop that goes on")
    peer.wait(lambda: any(c.instruction == "fault hang 2" for c in peer.chunks), "recovery")
    assert max(chunk.latency_s for chunk in peer.chunks) < 1.0
    peer.wait(lambda: not tells(peer, "no answer"), "end of the error")
    assert value(peer, "executor", "hangs") == 1
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])


def test_failures_in_a_row_deactivate(peer: Peer, process: NodeProcess) -> None:
    """Promise 4. Pins: a NaN that reaches the robot, a policy that fails and is asked for ever."""
    start_moving(peer)
    peer.instruct("fault nan 2")
    peer.wait(lambda: peer.statuses[-1].inference_failures == 2, "two failures")
    peer.wait(lambda: any(c.instruction == "fault nan 2" for c in peer.chunks), "chunk after them")
    assert peer.statuses[-1].state == PolicyStatus.ACTIVE
    for fault, words in (("nan", "not finite"), ("shape", "promise"), ("raise", "told to raise")):
        peer.instruct(f"fault {fault}")
        peer.wait(lambda: peer.statuses[-1].state == PolicyStatus.INACTIVE, f"end by {fault}")
        assert tells(peer, "3 inferences failed in a row") and tells(peer, words)
        assert level(peer, "node") == DiagnosticStatus.ERROR
        assert quiet(peer, 0.2)
        peer.instruct("sweep")
        assert peer.change_state("activate")
        starts_at(peer, HOME)
        assert not tells(peer, "failed in a row")
    assert np.isfinite([chunk.positions for chunk in peer.chunks]).all()
    check_limits(peer.trajectories[LEFT])


@pytest.mark.parametrize(
    ("fault", "words"), [("oom", "CUDA out of memory"), ("exit", "the inference thread ended")]
)
def test_a_device_that_fails_ends_in_error_processing(
    peer: Peer, process: NodeProcess, fault: str, words: str
) -> None:
    """Promise 17. Pins: a thread that is left behind, a node that cannot be configured again."""
    threads = process.threads
    start_moving(peer)
    assert process.threads > threads
    peer.instruct(f"fault {fault}")
    peer.wait(lambda: peer.statuses[-1].state == PolicyStatus.ERROR, "error processing")
    assert tells(peer, words)
    assert not arrays(peer.trajectories[LEFT][-1])[2][-1].any()
    assert quiet(peer, 0.2)
    assert process.threads == threads
    assert "left behind" not in process.log
    start(peer)
    starts_at(peer, HOME)


def test_a_load_that_hangs_fails_in_time(peer: Peer, process: NodeProcess) -> None:
    """Promise 18. Pins: a configure that never answers."""
    assert peer.set_parameter("policy", "checkpoint", "load hang").successful
    assert peer.set_parameter("policy", "load_timeout_s", 1.0).successful
    try:
        began_s = time.monotonic()
        assert not peer.change_state("configure")
        assert time.monotonic() - began_s < 4.0
        assert "the policy is not ready after 1 s" in process.log
        assert not peer.change_state("activate")
    finally:
        assert peer.set_parameter("policy", "checkpoint", "wave").successful
        assert peer.set_parameter("policy", "load_timeout_s", 600.0).successful


def test_incompatible_qos_is_named(peer: Peer, process: NodeProcess) -> None:
    """Promise 15. Pins: an instruction that never arrives and nobody knows why."""
    start_moving(peer)
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    topic = f"{LEFT}/joint_trajectory"
    publisher = peer.node.create_publisher(String, "instruction", best_effort)
    subscription = peer.node.create_subscription(JointTrajectory, topic, lambda _: None, latched)
    try:
        peer.wait(lambda: tells(peer, "topic /instruction: a publisher"), "mismatch of the input")
        peer.wait(lambda: tells(peer, f"topic /{topic}: a subscriber"), "mismatch of the output")
        assert tells(peer, "policy RELIABILITY") and tells(peer, "policy DURABILITY")
        assert "RELIABILITY" in process.log
        peer.wait(lambda: level(peer, "topics") == DiagnosticStatus.ERROR, "error of the topics")
    finally:
        peer.node.destroy_publisher(publisher)
        peer.node.destroy_subscription(subscription)
    peer.wait(lambda: not tells(peer, "incompatible QoS"), "end of the mismatch")


def shifted(camera: str, stamp_s: float) -> Image:
    return default_image(camera, stamp_s - (0.08 if camera == "cam_high" else 0.0))


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
        peer.wait(lambda: tells(peer, words), f"problem {words!r}")  # noqa: B023
        time.sleep(0.1)
        peer.chunks.clear()
        time.sleep(0.2)
        assert not peer.chunks, words
        peer.make_image, peer.make_joints = default_image, default_joints
        peer.wait(lambda: peer.chunks, f"chunk after {words!r}")
        assert peer.statuses[-1].state == PolicyStatus.ACTIVE
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
    time.sleep(0.3)
    assert all(at_rest(peer.trajectories[name][-1]) for name in CONTROLLERS)
    peer.run_robot()
    peer.wait(lambda: level(peer, "joints") == DiagnosticStatus.OK, "end of the error")


def test_a_picture_that_changes_in_mid_stream(peer: Peer) -> None:
    """Promise 14. Pins: pixels read by the first frame's size or encoding; a bad one that kills."""

    def grey(camera: str, stamp_s: float) -> Image:
        image = default_image(camera, stamp_s)
        image.height, image.width, image.step, image.encoding = 30, 50, 50, "mono8"
        image.data = bytes(1500)
        return image

    def cut_short(camera: str, stamp_s: float) -> Image:
        image = default_image(camera, stamp_s)
        image.data = image.data[:100]
        return image

    start_moving(peer)
    peer.make_image = cut_short
    peer.wait(lambda: peer.statuses[-1].inference_failures > 4, "damaged pictures")
    assert peer.statuses[-1].state == PolicyStatus.ACTIVE
    peer.chunks.clear()
    peer.make_image = grey
    peer.wait(lambda: len(peer.chunks) > 2, "chunks from other pictures")
    camera = peer.wait(
        lambda: (
            level(peer, "camera cam_high") == DiagnosticStatus.WARN
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
            peer.forget()
            starts_at(peer, peer.positions)
            stamp_s = arrays(peer.trajectories[LEFT][0])[0]
            assert abs(stamp_s - clock()) < 1.0
        clock.frozen_s = clock()
        time.sleep(0.2)
        assert quiet(peer)
        assert peer.fresh_status().state == PolicyStatus.ACTIVE
        clock.frozen_s = None
        peer.forget()
        peer.wait(lambda: moved(peer), "motion when the clock goes on")
    finally:
        peer.change_state("deactivate")
        peer.clock_s = None
        assert peer.set_parameter("policy", "use_sim_time", False).successful


def test_a_controller_that_is_gone_stops_the_stream(peer: Peer) -> None:
    """Promise 11. Pins: a controller that comes back into the middle of a motion."""
    start_moving(peer)
    peer.stop_controllers()
    peer.wait(lambda: tells(peer, "nobody listens to left_arm_controller"), "problem")
    peer.wait(lambda: level(peer, "controllers") == DiagnosticStatus.ERROR, "error")
    trajectories = peer.fresh_status().trajectories
    peer.positions = HOME + 0.03
    time.sleep(0.3)
    assert peer.statuses[-1].trajectories == trajectories
    peer.forget()
    peer.start_controllers()
    starts_at(peer, HOME + 0.03)
    peer.wait(lambda: level(peer, "controllers") == DiagnosticStatus.OK, "end of the error")
    key = "left_arm_controller/joint_trajectory subscribers"
    assert value(peer, "controllers", key) == 1


def test_a_far_first_command_is_ramped_to_or_refused(peer: Peer) -> None:
    """Promise 19. Pins: an arm that rushes to where the policy takes it to be."""
    start(peer, "fault far")
    peer.wait(lambda: moved(peer), "trajectory")
    time.sleep(1.0)
    ramp = peer.trajectories[LEFT]
    check_limits(ramp)
    fastest = max(np.abs(arrays(trajectory)[2][:, 0]).max() for trajectory in ramp)
    assert 0.05 < fastest <= 1.1 * 0.25 * limits().max_velocity[0]
    assert peer.change_state("deactivate") and peer.change_state("cleanup")
    assert peer.set_parameter("policy", "faults.first_command", "refuse").successful
    try:
        peer.forget()
        start(peer, "fault far")
        peer.wait(lambda: tells(peer, "first command: joint 'left_waist'"), "refusal")
        peer.wait(lambda: level(peer, "scheduler") == DiagnosticStatus.ERROR, "error")
        assert not moved(peer)
        peer.instruct("sweep")
        peer.wait(lambda: moved(peer), "trajectory to a near command")
    finally:
        assert peer.set_parameter("policy", "faults.first_command", "ramp").successful


def test_any_targets_stay_inside_the_limits(peer: Peer) -> None:
    """Promises 5 and 6. Targets up to 100 rad away, another one at each step."""
    start(peer, "fault wild")
    peer.wait(lambda: len(peer.trajectories[LEFT]) > 60, "trajectories")
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])
        check_seams(peer.trajectories[name])
    peer.wait(lambda: value(peer, "limits", "left_waist") > 0, "clamps of a joint")
    assert value(peer, "limits", "position clamps") > 0
    assert sum(peer.statuses[-1].clamped_position) > 0


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


def test_a_dry_run_publishes_no_command(peer: Peer) -> None:
    """Promise 20."""
    assert peer.set_parameter("policy", "dry_run", True).successful
    try:
        start(peer)
        peer.wait(lambda: len(peer.chunks) > 2, "chunks")
        assert not any(peer.trajectories[name] for name in CONTROLLERS)
        assert peer.change_state("deactivate")
        time.sleep(0.2)
        assert not any(peer.trajectories[name] for name in CONTROLLERS)
    finally:
        assert peer.set_parameter("policy", "dry_run", False).successful
