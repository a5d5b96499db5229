"""What the synthetic dataset of these tests holds."""

from __future__ import annotations

import numpy as np

from pi05_ros.types import ImageArray

JOINTS = ("a", "b", "c")
LENGTHS = (5, 1, 8)
SIZES = {"high": (32, 48), "wrist": (24, 24)}


def image_of(episode: int, frame: int, size: tuple[int, int]) -> ImageArray:
    """Smooth, as video likes it, and different for every frame."""
    y, x = np.mgrid[: size[0], : size[1]]
    channels = (4 * x + 10 * frame, 5 * y + 30 * episode, 0 * x + 20 * frame)
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def task_of(episode: int) -> str:
    return ("touch the red cube", "wave")[episode % 2]
