"""Arms that hold their last command for ever, one by velocity and one by position.

Faults pinned: one arm left moving when the other's controller is gone, or while the other one
brakes; a step when a controller comes back after some ms; a recorder taken for a controller; two
policies on one controller; a stop that waits for a load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from direct_arms import POSITION, VELOCITY, Arms, launch
from fault_steps import level, shows
from harness import CONTROLLERS, HOME, NodeProcess, Peer
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from pi05_ros.msg import PolicyStatus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    process = launch(tmp_path_factory.mktemp("direct") / "policy_node.log")
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log


@pytest.fixture()
def arms(process: NodeProcess, shared_peer: Peer) -> Iterator[Arms]:
    """Both arms move fast."""
    peer = shared_peer
    peer.positions = HOME.copy()
    arms = Arms(peer)
    begin(arms)
    yield arms
    assert peer.change_state("deactivate") and peer.change_state("cleanup")
    arms.destroy()
    peer.stop_robot()


def begin(arms: Arms, instruction: str = "fault fast") -> None:
    peer = arms.peer
    peer.reset()
    assert peer.change_state("configure")
    peer.run_robot()
    peer.instruct(instruction)
    assert peer.change_state("activate")
    peer.wait(arms.fast, "fast motion of both arms")


def test_velocities_are_warned_of(arms: Arms, process: NodeProcess) -> None:
    """A killed process cannot brake an arm that keeps its velocity."""
    assert "keeps the last one for ever" in process.log


def test_stop_brakes_both_arms_together(arms: Arms) -> None:
    """Fault: the second arm 211 ms without a command at 1.35 rad/s, its braking replayed then."""
    since_s = time.monotonic()
    arms.peer.trigger("policy/stop")
    arms.peer.wait(lambda: arms.rest(*CONTROLLERS), "rest")
    arms.check_steps(since_s)
    for name in CONTROLLERS:
        times_s, speeds = arms.velocities(name, since_s)
        moving = np.abs(speeds) > 1e-3
        assert not moving[np.argmin(moving) :].any(), f"{name} moved again"
        assert np.diff(times_s[: moving.sum() + 1]).max(initial=0.0) < 0.15, f"{name} had a gap"
    arms.peer.trigger("policy/resume")
    arms.peer.wait(arms.fast, "motion after resume")
    arms.check_steps(since_s)


@pytest.mark.parametrize("lost", CONTROLLERS)
def test_the_other_arm_brakes_when_a_controller_is_lost(arms: Arms, lost: str) -> None:
    """Fault: 0.92 rad/s without end, and the node stays active."""
    (other,) = set(CONTROLLERS) - {lost}
    since_s = time.monotonic()
    arms.unsubscribe(lost)
    arms.peer.wait(lambda: arms.rest(other), f"rest of {other}")
    arms.check_steps(since_s, other)
    arms.peer.wait(lambda: shows(arms.peer, f"no controller subscribes to {lost}"), "problem")
    assert arms.peer.fresh_status().state == PolicyStatus.ACTIVE
    arms.commands[lost].clear()
    arms.subscribe(lost)
    since_s = time.monotonic()
    arms.peer.wait(arms.fast, "motion of both arms")
    arms.check_steps(since_s)


def test_a_controller_that_flaps_makes_no_step(arms: Arms) -> None:
    """Fault: a subscriber that is away for 30–60 ms starts all arms at rest in mid-motion."""
    for away_s in (0.03, 0.06, 0.045):
        arms.peer.wait(arms.fast, "fast motion of both arms")
        since_s = time.monotonic()
        arms.unsubscribe(VELOCITY)
        time.sleep(away_s)
        arms.subscribe(VELOCITY)
        time.sleep(0.6)
        arms.check_steps(since_s, POSITION)


def test_a_recorder_does_not_keep_the_commands_going(arms: Arms) -> None:
    """Fault: 150 messages after the controller was killed, and no word."""
    recorder = Node("rosbag2_recorder", start_parameter_services=False)
    topic = f"{POSITION}/commands"
    recorder.create_subscription(Float64MultiArray, topic, lambda _: None, 10)
    time.sleep(0.5)
    arms.unsubscribe(POSITION)
    arms.peer.wait(lambda: shows(arms.peer, "subscribers: /rosbag2_recorder"), "problem")
    arms.peer.wait(lambda: arms.rest(VELOCITY), "rest of the other arm")
    arms.subscribe(POSITION)
    recorder.destroy_node()


@pytest.mark.parametrize("topic", [f"{VELOCITY}/commands", "joint_states"])
def test_a_second_publisher_stops_the_motion(arms: Arms, topic: str) -> None:
    """Faults: two policies pull one arm back and forth; two drivers report two robots."""
    peer = arms.peer
    since_s = time.monotonic()
    kind = JointState if topic == "joint_states" else Float64MultiArray
    publisher = peer.node.create_publisher(kind, topic, 10)
    peer.wait(lambda: shows(peer, f"publishers: 2 on /{topic}"), "problem")
    peer.wait(lambda: level(peer, "controllers") == DiagnosticStatus.ERROR, "error")
    peer.wait(lambda: arms.rest(*CONTROLLERS), "rest")
    arms.check_steps(since_s)
    peer.destroy(peer.node.destroy_publisher, publisher)
    peer.wait(arms.fast, "motion when it is gone")


def test_a_stop_is_served_while_a_policy_loads(
    process: NodeProcess, shared_peer: Peer, tmp_path: Path
) -> None:
    """Fault: served after up to 600 s, when the arms move already; no status meanwhile."""
    peer, end = shared_peer, tmp_path / "end"
    assert peer.set_parameter("policy", "checkpoint", f"load until {end}").successful
    configured: list[bool] = []
    thread = threading.Thread(target=lambda: configured.append(peer.change_state("configure")))
    try:
        thread.start()
        peer.wait(lambda: shows(peer, "loading"), "status that says so")
        peer.trigger("policy/stop")
        assert not configured, "the stop waited for the load"
        assert not peer.set_parameter("policy", "checkpoint", "wave").successful
    finally:
        end.touch()
        thread.join(60.0)
        assert peer.set_parameter("policy", "checkpoint", "wave").successful
    assert configured == [False]
    assert peer.trigger("policy/resume") == "resumed"
