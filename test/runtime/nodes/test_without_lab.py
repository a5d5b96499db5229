"""A robot's computer: neither the lab nor the libraries of the lab are installed.

Fault pinned: an import that only a developer's machine can make, found when the robot starts.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from harness import CONTROLLERS, NodeProcess, Peer

pytestmark = pytest.mark.slow

PROGRAM = """
    import sys

    # None makes an import raise, and a probe by importlib.util.find_spec find nothing
    for name in ("pi05_lab", "mujoco", "matplotlib", "pyarrow", "av", "pandas"):
        sys.modules[name] = None

    from pi05_ros.nodes.main import policy_node

    raise SystemExit(policy_node())
"""


def test_the_policy_node_moves_the_arms_without_the_lab(tmp_path: Path) -> None:
    program = tmp_path / "policy_node.py"
    program.write_text(textwrap.dedent(PROGRAM))
    process = NodeProcess(program, tmp_path / "log", "-p", "num_steps:=2")
    peer = Peer()
    try:
        peer.wait(lambda: peer.statuses or process.ended, "status", 60.0)
        assert peer.change_state("configure"), process.log
        peer.run_robot()
        assert peer.change_state("activate")
        peer.instruct("wave with the left arm")
        peer.wait(lambda: peer.chunks, "chunk")
        peer.wait(lambda: all(peer.trajectories[name] for name in CONTROLLERS), "trajectory")
        assert peer.change_state("deactivate")
    finally:
        peer.close()
        assert process.stop() == 0, process.log
