from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import JOINTS, LENGTHS, SIZES, image_of, task_of

from pi05_lab.data.lerobot_format import Extra, Features
from pi05_lab.data.lerobot_writer import DatasetWriter


@pytest.fixture
def numbers() -> dict[str, list[Any]]:
    """By episode: state and action [n, 3], label [n, 4, 3]."""
    rng = np.random.default_rng(7)
    return {
        key: [rng.normal(size=(n, *shape)).astype(np.float32) for n in LENGTHS]
        for key, shape in {"state": (3,), "action": (3,), "label": (4, 3)}.items()
    }


@pytest.fixture
def write(tmp_path: Path, numbers: dict[str, list[Any]]) -> Callable[..., Path]:
    """Writes the synthetic dataset: episodes of 5, 1 and 8 frames from two cameras at 10 Hz."""

    def record(name: str = "dataset", use_video: bool = False, label: bool = False) -> Path:
        extras = {"action_chunk": Extra((4, 3))} if label else {}
        features = Features(SIZES, JOINTS, JOINTS, extras, use_video)
        with DatasetWriter(tmp_path / name, 10, features) as writer:
            for episode, length in enumerate(LENGTHS):
                for k in range(length):
                    extra = {"action_chunk": numbers["label"][episode][k]} if label else None
                    images = {c: image_of(episode, k, size) for c, size in SIZES.items()}
                    state, action = (numbers[key][episode][k] for key in ("state", "action"))
                    writer.add_frame(images, state, action, task_of(episode), extra)
                writer.end_episode()
        return tmp_path / name

    return record
