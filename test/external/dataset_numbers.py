"""Writes what this package's own reader finds in a data set: DATASET FILE.npz."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lab.data.lerobot_dataset import LeRobotDataset

data = LeRobotDataset(Path(sys.argv[1]))
frames = np.linspace(0, len(data) - 1, 12).astype(int)
images: dict[str, Any] = {
    camera: np.stack([data.images(int(k))[camera] for k in frames]) for camera in data.cameras
}
np.savez(
    sys.argv[2],
    state=data.state,
    action=data.action,
    episode=data.episode_index,
    tasks=np.array([data.task(k) for k in range(len(data))]),
    frames=frames,
    **images,
)
