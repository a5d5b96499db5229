"""A policy that hangs, fails or never loads behind the running node."""

from __future__ import annotations

import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_steps import LEFT, level, quiet, shows, start, start_moving, starts_at, value
from harness import CONTROLLERS, HOME, NodeProcess, Peer, arrays, at_rest, check_limits

from pi05_ros.msg import PolicyStatus

pytestmark = pytest.mark.slow


def test_a_hang_is_a_problem_until_it_ends(peer: Peer, process: NodeProcess) -> None:
    """Promise 7. Pins: a control loop that waits for the policy, a chunk of long ago that moves."""
    start_moving(peer)
    time.sleep(0.5)
    peer.chunks.clear()
    peer.instruct("fault hang 2")
    peer.wait(lambda: level(peer, "executor") == DiagnosticStatus.ERROR, "error of the executor")
    assert shows(peer, "policy: no answer for")
    peer.wait(lambda: value(peer, "executor", "misses") >= 1, "end of the chunks")
    time.sleep(0.3)
    assert all(at_rest(peer.trajectories[name][-1]) for name in CONTROLLERS)
    ticks = peer.statuses[-1].ticks
    peer.wait(lambda: peer.statuses[-1].ticks > ticks, "ticks during the hang")
    peer.wait(lambda: any(c.instruction == "fault hang 2" for c in peer.chunks), "recovery")
    assert max(chunk.latency_s for chunk in peer.chunks) < 1.0
    peer.wait(lambda: not shows(peer, "no answer"), "end of the error")
    assert value(peer, "executor", "hangs") == 1
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])


def test_failures_in_a_row_deactivate(peer: Peer, process: NodeProcess) -> None:
    """Promise 4. Pins: a NaN that reaches the robot, a policy that fails and is run for ever."""
    start_moving(peer)
    peer.instruct("fault nan 2")
    peer.wait(lambda: peer.statuses[-1].inference_failures == 2, "two failures")
    peer.wait(lambda: any(c.instruction == "fault nan 2" for c in peer.chunks), "chunk after them")
    assert peer.statuses[-1].state == PolicyStatus.ACTIVE
    for fault, words in (("nan", "not finite"), ("shape", "promise"), ("raise", "told to raise")):
        peer.instruct(f"fault {fault}")
        peer.wait(lambda: peer.statuses[-1].state == PolicyStatus.INACTIVE, f"end by {fault}")
        assert shows(peer, "3 inferences failed in a row") and shows(peer, words)
        assert level(peer, "node") == DiagnosticStatus.ERROR
        assert quiet(peer, 0.2)
        peer.positions = HOME.copy()
        time.sleep(0.3)  # joint states from before the arms were moved by hand prove a start too
        peer.instruct("sweep")
        assert peer.change_state("activate")
        starts_at(peer, HOME)
        assert not shows(peer, "failed in a row")
    assert np.isfinite([chunk.positions for chunk in peer.chunks]).all()
    check_limits(peer.trajectories[LEFT])


def test_out_of_memory_is_recovered_in_place(peer: Peer, process: NodeProcess) -> None:
    """Promise 17. Pins: a policy that is unloaded where emptying the device's cache is enough."""
    threads = process.threads
    start_moving(peer)
    peer.instruct("fault oom 1")
    peer.wait(
        lambda: any(c.instruction == "fault oom 1" for c in peer.chunks), "repeated inference"
    )
    status = peer.fresh_status()
    assert (status.inference_failures, status.state) == (0, PolicyStatus.ACTIVE)
    peer.instruct("fault oom")
    peer.wait(lambda: peer.statuses[-1].state == PolicyStatus.INACTIVE, "end of the motion")
    assert shows(peer, "3 inferences failed in a row") and shows(peer, "CUDA out of memory")
    assert process.threads > threads  # the policy stays loaded
    peer.instruct("sweep")
    assert peer.change_state("activate")
    starts_at(peer, HOME)


@pytest.mark.parametrize(("fault", "words"), [("exit", "the inference thread ended")])
def test_a_device_that_fails_ends_in_error_processing(
    peer: Peer, process: NodeProcess, fault: str, words: str
) -> None:
    """Promise 17. Pins: a thread that is left behind, a node that cannot be configured again."""
    threads = process.threads
    start_moving(peer)
    assert process.threads > threads
    peer.instruct(f"fault {fault}")
    peer.wait(lambda: peer.statuses[-1].state == PolicyStatus.ERROR, "error processing")
    assert shows(peer, words)
    assert not arrays(peer.trajectories[LEFT][-1])[2][-1].any()
    assert quiet(peer, 0.2)
    assert process.threads == threads
    assert "left behind" not in process.log
    peer.positions = HOME.copy()
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
