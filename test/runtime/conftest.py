from collections.abc import Iterator

import pytest
from runner_rig import Rig  # type: ignore[import-not-found]


@pytest.fixture()
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()
