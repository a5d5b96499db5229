"""Faults pinned: a simulated camera that repeats to the byte, or whose noise shows."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_lab.sim.node import NOISY_VALUES, ReadNoise


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_every_image_differs_a_little(value: int) -> None:
    image = np.full((48, 64, 3), value, np.uint8)
    noise = ReadNoise(0)
    first, second = noise(image), noise(image)
    for noisy in (first, second):
        difference = noisy.astype(int) - image
        assert 0 < np.count_nonzero(difference) <= NOISY_VALUES
        assert set(np.unique(difference)) <= {-1, 0, 1}
    assert not np.array_equal(first, second)
    assert (image == value).all()


def test_the_same_seed_gives_the_same_noise() -> None:
    image = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    assert np.array_equal(ReadNoise(3)(image), ReadNoise(3)(image))
    assert not np.array_equal(ReadNoise(3)(image), ReadNoise(4)(image))
