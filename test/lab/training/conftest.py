"""The data that most of these tests learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
from squares_world import write_dataset  # type: ignore[import-not-found]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures under two instructions each."""
    return write_dataset(tmp_path_factory.mktemp("squares") / "labelled", 20)
