"""A robot without torch, and its policy in a server's process.

Faults: an import of torch on the robot's computer, arms that move on after the server is gone, a
node that never moves again after it came back.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import CONTROLLERS, NodeProcess, Peer

pytestmark = pytest.mark.slow

NODE = """
    import sys

    for name in ("pi05_lab", "torch", "transformers"):
        sys.modules[name] = None

    from pi05_ros.nodes.main import policy_node

    raise SystemExit(policy_node())
"""
START_S = 60.0


@contextmanager
def server(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`pi05 serve small`, and its port."""
    command = [sys.executable, "-m", "pi05_ros.cli", "serve", "small", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = re.fullmatch(r"ws://127\.0\.0\.1:(\d+)\n", line)
            if found:
                yield process, int(found[1])
                return
        pytest.fail("the server ended before it listened")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30.0) == 0 or process.returncode == -signal.SIGKILL
        process.stdout.close()


def test_a_server_moves_the_arms_and_its_death_brakes_them(tmp_path: Path) -> None:
    program = tmp_path / "policy_node.py"
    program.write_text(textwrap.dedent(NODE))
    with server() as (serving, port):
        address = f"ws://127.0.0.1:{port}"
        process = NodeProcess(program, tmp_path / "log", "-p", f"checkpoint:={address}")
        peer = Peer()
        try:
            peer.wait(lambda: peer.statuses or process.ended, "status", START_S)
            assert peer.change_state("configure"), process.log
            peer.run_robot()
            assert peer.change_state("activate")
            peer.instruct("wave with the left arm")
            peer.wait(lambda: all(peer.trajectories[name] for name in CONTROLLERS), "trajectory")
            serving.kill()
            serving.wait(10.0)
            peer.wait(lambda: "no policy server at" in process.log, "an error", 20.0)
            peer.wait(lambda: peer.statuses[-1].state == peer.statuses[-1].INACTIVE, "a fault")
            assert "motion ends: 3 inferences failed in a row" in process.log
            # what was published last ends at rest
            for name in CONTROLLERS:
                assert not any(peer.trajectories[name][-1].points[-1].velocities)
            time.sleep(0.5)
            count = len(peer.chunks)
            with server(port):
                assert peer.change_state("activate")
                peer.wait(lambda: len(peer.chunks) > count + 2, "chunks of the new server", 20.0)
                assert peer.change_state("deactivate")
        finally:
            peer.close()
            assert process.stop() == 0, process.log
