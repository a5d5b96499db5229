"""The node around a policy that fails as its instruction tells it to, and a robot to talk to it.

The policy behind the node is `test/soak/faulty_policy_node.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_steps import HANG_TIMEOUT_S
from harness import HOME, ROOT, NodeProcess, Peer, default_image, default_joints

from pi05_ros.msg import PolicyStatus


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


@pytest.fixture(scope="module")
def shared_peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture()
def peer(process: NodeProcess, shared_peer: Peer) -> Iterator[Peer]:
    """The node is unconfigured before each test and again after it."""
    peer = shared_peer
    peer.positions = HOME.copy()
    peer.reset()
    peer.wait(lambda: peer.statuses or process.ended, "status", 60.0)
    assert not process.ended, process.log
    yield peer
    peer.cameras, peer.publish_joints = (), False
    peer.make_image, peer.make_joints = default_image, default_joints
    state = peer.fresh_status().state
    if state == PolicyStatus.ACTIVE:
        assert peer.change_state("deactivate")
    if state in (PolicyStatus.ACTIVE, PolicyStatus.INACTIVE):
        assert peer.change_state("cleanup")
