"""A sensor's read noise for rendered images, which repeat to the byte while nothing moves."""

from __future__ import annotations

import numpy as np

from pi05_ros.types import ImageArray

NOISY_VALUES = 400


class ReadNoise:
    """Changes 400 values of each image by one grey value; the same seed, the same noise."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, image: ImageArray) -> ImageArray:
        """A noisy copy of [height, width, 3], for one thread."""
        noisy = image.copy()
        values = noisy.reshape(-1)
        where = self._rng.integers(0, values.size, NOISY_VALUES)
        up = self._rng.integers(0, 2, NOISY_VALUES, dtype=np.uint8)
        # black cannot fall and white cannot rise
        chosen = image.reshape(-1)[where]
        up[chosen == 0], up[chosen == 255] = 1, 0
        values[where] = chosen + 2 * up - 1
        return noisy
