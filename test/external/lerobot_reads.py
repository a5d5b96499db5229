"""Loads a data set with LeRobot, iterates over all of it, and compares it: DATASET FILE.npz."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

HORIZON = 10


def main(root: str, numbers: str) -> None:
    """Raise AssertionError at the first difference."""
    expected = np.load(numbers)
    data: Any = LeRobotDataset("local/data", root=root)
    assert len(data) == len(expected["state"]) and data.num_episodes == len(
        set(expected["episode"].tolist())
    )
    seen = 0
    for batch in torch.utils.data.DataLoader(data, batch_size=32):
        rows = batch["index"].numpy()
        for key, feature in (("state", "observation.state"), ("action", "action")):
            np.testing.assert_array_equal(batch[feature].numpy(), expected[key][rows])
        assert batch["task"] == expected["tasks"][rows].tolist()
        np.testing.assert_array_equal(batch["episode_index"].numpy(), expected["episode"][rows])
        seen += len(rows)
    assert seen == len(data)
    for camera in (key for key in expected.files if key.startswith("cam_")):
        for k, image in zip(expected["frames"], expected[camera], strict=True):
            theirs = data[int(k)][f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
            # decoders of video differ by rounding
            assert np.abs(theirs - image).max() < 3, (camera, k)
    chunks: Any = LeRobotDataset(
        "local/data", root=root, delta_timestamps={"action": [k / data.fps for k in range(HORIZON)]}
    )
    np.testing.assert_array_equal(chunks[0]["action"].numpy(), expected["action"][:HORIZON])
    assert chunks[len(chunks) - 1]["action_is_pad"].sum() == HORIZON - 1
    print(f"{root}: {seen} frames as lerobot {version('lerobot')} reads them")


if __name__ == "__main__":
    main(*sys.argv[1:])
