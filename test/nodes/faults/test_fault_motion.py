"""How the running node moves, and how an operator ends it."""

from __future__ import annotations

import time

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from fault_steps import (
    ELSEWHERE,
    LEFT,
    level,
    moved,
    quiet,
    start,
    start_moving,
    starts_at,
    tells,
    value,
)
from harness import (
    CONTROLLERS,
    HOME,
    NodeProcess,
    Peer,
    arrays,
    at_rest,
    check_limits,
    check_seams,
    limits,
)


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
    peer.positions = ELSEWHERE
    time.sleep(0.1)
    peer.trigger("policy/resume")
    starts_at(peer, ELSEWHERE)


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


def test_a_controller_that_is_gone_stops_the_stream(peer: Peer) -> None:
    """Promise 11. Pins: a controller that comes back into the middle of a motion."""
    start_moving(peer)
    peer.stop_controllers()
    peer.wait(lambda: tells(peer, "no controller subscribes to left_arm_controller"), "problem")
    peer.wait(lambda: level(peer, "controllers") == DiagnosticStatus.ERROR, "error")
    trajectories = peer.fresh_status().trajectories
    peer.positions = ELSEWHERE
    time.sleep(0.3)
    assert peer.statuses[-1].trajectories == trajectories
    peer.forget()
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
        peer.forget()
        start(peer, "fault far")
        peer.wait(lambda: tells(peer, "first command: joint 'left_waist'"), "refusal")
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
        check_seams(peer.trajectories[name])
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
