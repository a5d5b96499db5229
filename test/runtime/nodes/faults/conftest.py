"""A node whose policy fails as its instruction says, and the rest of the robot.

The policy behind the node is `test/soak/faulty_policy_node.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_steps import HANG_TIMEOUT_S
from harness import ROOT, NodeProcess, Peer, unconfigured


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    process = NodeProcess(
        ROOT / "test" / "soak" / "faulty_policy_node.py",
        tmp_path_factory.mktemp("faults") / "policy_node.log",
        *("-p", "checkpoint:=wave", "-p", "status_rate_hz:=10.0"),
        *("-p", f"faults.hang_timeout_s:={HANG_TIMEOUT_S}"),
    )
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log


@pytest.fixture()
def peer(process: NodeProcess, shared_peer: Peer) -> Iterator[Peer]:
    with unconfigured(shared_peer, process) as peer:
        yield peer
