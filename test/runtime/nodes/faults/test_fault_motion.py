"""How the running node moves, and how an operator ends it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_steps import (
    ELSEWHERE,
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
    CONTROLLERS,
    HOME,
    NodeProcess,
    Peer,
    arrays,
    at_rest,
    check_boundaries,
    check_limits,
    default_joints,
    limits,
)
from sensor_msgs.msg import JointState

pytestmark = pytest.mark.slow


def test_stop_is_latched_until_resume(peer: Peer, process: NodeProcess) -> None:
    """Promise 8. Pins: a motion after the stop, an activation that ends it, a resume in mid-air."""
    start_moving(peer)
    assert "~/resume" in peer.trigger("policy/stop")
    time.sleep(0.15)
    for name in CONTROLLERS:
        assert not arrays(peer.trajectories[name][-1])[2][-1].any()
        check_boundaries(peer.trajectories[name])
    assert quiet(peer)
    assert shows(peer, "stopped: ~/resume ends it")
    assert level(peer, "node") == DiagnosticStatus.WARN
    inferences = peer.statuses[-1].inferences
    assert peer.change_state("deactivate") and peer.change_state("activate")
    assert quiet(peer)
    assert peer.statuses[-1].inferences == inferences
    assert peer.change_state("deactivate") and peer.change_state("cleanup")
    assert peer.change_state("configure") and peer.change_state("activate")
    peer.instruct("sweep")
    assert quiet(peer)
    peer.positions = ELSEWHERE
    time.sleep(0.1)
    peer.trigger("policy/resume")
    starts_at(peer, ELSEWHERE)


def test_speed_zero_comes_to_rest_and_resumes(peer: Peer) -> None:
    """Promise 20. Pins: a jump when the speed changes, a plan that continues at speed 0."""
    start_moving(peer)
    assert peer.set_parameter("policy", "scheduler.speed_scale", 0.0).successful
    try:
        time.sleep(1.0)
        resting = {name: peer.trajectories[name][-1] for name in CONTROLLERS}
        assert all(at_rest(trajectory) for trajectory in resting.values())
        assert shows(peer, "scheduler.speed_scale is 0")
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
        check_boundaries(peer.trajectories[name])


def test_a_controller_that_is_gone_stops_the_stream(peer: Peer) -> None:
    """Promise 11. Pins: a controller that comes back into the middle of a motion."""
    start_moving(peer)
    peer.stop_controllers()
    peer.wait(lambda: shows(peer, "no controller subscribes to left_arm_controller"), "problem")
    peer.wait(lambda: level(peer, "controllers") == DiagnosticStatus.ERROR, "error")
    trajectories = peer.fresh_status().trajectories
    peer.positions = ELSEWHERE
    time.sleep(0.3)
    assert peer.statuses[-1].trajectories == trajectories
    peer.reset()
    peer.start_controllers()
    starts_at(peer, ELSEWHERE)
    peer.wait(lambda: level(peer, "controllers") == DiagnosticStatus.OK, "end of the error")
    (subscriber,) = [
        pair.value
        for pair in peer.diagnostics["policy: controllers"].values
        if pair.key == "left_arm_controller/joint_trajectory subscribers"
    ]
    assert subscriber == "/peer"


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
        peer.positions = HOME.copy()
        peer.reset()
        start(peer, "fault far")
        peer.wait(lambda: shows(peer, "first command: joint 'left_waist'"), "refusal")
        peer.wait(lambda: level(peer, "scheduler") == DiagnosticStatus.ERROR, "error")
        assert not moved(peer)
        peer.instruct("sweep")
        peer.wait(lambda: moved(peer), "trajectory to a near command")
        assert peer.change_state("deactivate") and peer.change_state("cleanup")
    finally:
        assert peer.set_parameter("policy", "faults.first_command", "ramp").successful


def test_any_targets_stay_inside_the_limits(peer: Peer) -> None:
    """Promises 5 and 6. Targets up to 100 rad away, another one at each step."""
    start(peer, "fault wild")
    peer.wait(lambda: len(peer.trajectories[LEFT]) > 60, "trajectories")
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])
        check_boundaries(peer.trajectories[name])
    peer.wait(lambda: value(peer, "limits", "left_waist") > 0, "clamps of a joint")
    assert value(peer, "limits", "position clamps") > 0
    assert sum(peer.statuses[-1].clamped_position) > 0


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
        assert peer.change_state("cleanup")
    finally:
        assert peer.set_parameter("policy", "dry_run", False).successful


def test_a_joint_that_does_not_follow_stops_the_arms(peer: Peer, process: NodeProcess) -> None:
    """Promise 21. Pins: an e-stop, drives that are off or a blocked arm, every diagnostic OK, and a
    step when the drives come back."""
    start_moving(peer)
    blocked = peer.positions.copy()

    def blocked_joints(positions: np.ndarray, stamp_s: float) -> JointState:
        return default_joints(blocked, stamp_s)

    peer.instruct("fault far")
    peer.make_joints = blocked_joints
    peer.wait(lambda: level(peer, "tracking") == DiagnosticStatus.WARN, "warning")
    line = peer.wait(
        lambda: [p for p in peer.statuses[-1].problems if p.startswith("stopped: joint")], "stop"
    )[0]
    assert "waist" in line and "~/resume" in line
    assert level(peer, "tracking") == level(peer, "node") == DiagnosticStatus.ERROR
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])
        check_boundaries(peer.trajectories[name])
    assert quiet(peer)
    peer.make_joints = default_joints
    peer.positions = ELSEWHERE
    assert quiet(peer), "motion without resume"
    peer.trigger("policy/resume")
    starts_at(peer, ELSEWHERE)


@pytest.mark.parametrize("wrong", [12.5, 1e9])
def test_no_motion_starts_at_a_wrong_joint_state(peer: Peer, wrong: float) -> None:
    """Promise 22. Pins: 12.5 rad/s at a resume, by one encoder's glitch or a second driver."""
    noisy = {"glitch": True}

    def glitching(positions: np.ndarray, stamp_s: float) -> JointState:
        message = default_joints(positions, stamp_s)
        if noisy["glitch"]:
            message.position[2] = wrong
        noisy["glitch"] = not noisy["glitch"]
        return message

    peer.make_joints = glitching
    start(peer)
    peer.wait(lambda: shows(peer, "start: joint 'left_elbow'"), "problem")
    time.sleep(0.5)
    assert not any(peer.trajectories[name] for name in CONTROLLERS)
    peer.make_joints = default_joints
    starts_at(peer, HOME)
    check_limits(peer.trajectories[LEFT])


def test_a_whole_number_is_a_speed(peer: Peer) -> None:
    """Pins: `ros2 param set /policy scheduler.speed_scale 0` refused as an integer."""
    start_moving(peer)
    assert peer.set_parameter("policy", "scheduler.speed_scale", 0).successful
    peer.wait(lambda: shows(peer, "speed_scale is 0"), "problem")
    assert peer.set_parameter("policy", "scheduler.speed_scale", 1).successful


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dry_run", True),
        ("control_rate_hz", 20.0),
        ("checkpoint", "elsewhere"),
        ("joints.left_waist.upper", 1.0),
        ("scheduler.smoothing_hz", 5.0),
        ("use_sim_time", True),
    ],
)
def test_what_is_read_at_configure_is_refused_in_motion(
    peer: Peer, name: str, value: object
) -> None:
    """Pins: success for a change that changes nothing."""
    start_moving(peer)
    result = peer.set_parameter("policy", name, value)
    assert not result.successful and "next configure" in result.reason
