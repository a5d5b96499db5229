"""Ends of the process: the arms come to rest first. Each test has its own process."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from direct_arms import VELOCITY, Arms, launch
from harness import CONTROLLERS, HOME, NodeProcess, Peer

from pi05_ros.msg import PolicyStatus

pytestmark = pytest.mark.slow


@pytest.fixture()
def peer(shared_peer: Peer) -> Peer:
    return shared_peer


@contextlib.contextmanager
def fast_arms(peer: Peer, folder: Path) -> Iterator[tuple[NodeProcess, Arms]]:
    """A process of its own, whose arms move fast."""
    process = launch(folder / "log")
    arms = Arms(peer)
    try:
        peer.reset()
        peer.positions = HOME.copy()
        peer.wait(lambda: len(peer.statuses) > 2, "status", 60.0)
        assert peer.change_state("configure") and peer.change_state("activate")
        peer.run_robot()
        peer.instruct("fault fast")
        peer.wait(arms.fast, "fast motion of both arms")
        yield process, arms
    finally:
        arms.destroy()
        peer.stop_robot()
        process.stop()


@pytest.mark.parametrize(
    ("number", "hangs"),
    [
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
        (signal.SIGHUP, False),
        (signal.SIGTERM, True),
    ],
)
def test_a_signal_brakes_before_the_process_ends(
    peer: Peer, tmp_path: Path, number: signal.Signals, hangs: bool
) -> None:
    """Faults: the arms run on after Ctrl-C and SIGTERM; exit code -6 when an inference hangs."""
    with fast_arms(peer, tmp_path) as (process, arms):
        if hangs:
            peer.instruct("fault hang 30")
            time.sleep(0.2)
        since_s = time.monotonic()
        assert process.stop(10.0, number) == 0, process.log
        assert "Traceback" not in process.log and "terminate" not in process.log
        assert arms.last(VELOCITY) == 0.0
        arms.check_steps(since_s)
        time.sleep(0.3)
        assert arms.rest(*CONTROLLERS)


def test_the_last_status_says_that_the_node_is_shut_down(peer: Peer, tmp_path: Path) -> None:
    """Faults: ACTIVE for ever; the instruction stays latched after the policy is unloaded."""
    with fast_arms(peer, tmp_path) as (process, arms):
        assert peer.active_instructions[-1] == "fault fast"
        assert peer.change_state("active_shutdown")
        peer.wait(lambda: peer.statuses[-1].state == PolicyStatus.FINALIZED, "last status")
        peer.wait(lambda: peer.active_instructions[-1] == "", "end of the instruction")
        assert arms.last(VELOCITY) == 0.0
        assert process.stop() == 0, process.log


def test_a_lost_device_ends_the_process(peer: Peer, tmp_path: Path) -> None:
    """Fault: the node waits to be configured again with a CUDA context that fails for ever."""
    with fast_arms(peer, tmp_path) as (process, arms):
        since_s = time.monotonic()
        peer.instruct("fault lost")
        assert process.wait(20.0) == 70, process.log
        assert "the device is lost" in process.log and "Traceback" not in process.log
        assert arms.last(VELOCITY) == 0.0
        arms.check_steps(since_s)
