from collections.abc import Iterator

import pytest
from harness import Peer
from ros_domain_setup import ros

__all__ = ["ros"]


@pytest.fixture(scope="module")
def shared_peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()
