"""Faults: wrist images turned, values beyond the network's range, the same variant every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pi05_lab.training.augmentation import CROP, augment

SIDE = 60


def gradient() -> torch.Tensor:
    """Red rises to the right, green downwards."""
    ramp = torch.linspace(-0.5, 0.5, SIDE)
    right, down = ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE)
    return torch.stack((right, down, torch.zeros(SIDE, SIDE)))


def variants(camera: str, count: int = 40) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [augment(gradient(), camera, rng) for _ in range(count)]


@pytest.mark.parametrize("camera", ["base_0_rgb", "left_wrist_0_rgb"])
def test_an_augmented_image_is_one(camera: str) -> None:
    images = variants(camera)
    for image in images:
        assert image.shape == (3, SIDE, SIDE) and image.dtype == torch.float32
        assert image.min() >= -1 and image.max() <= 1
    assert len({image.numpy().tobytes() for image in images}) == len(images)
    again = augment(gradient(), camera, np.random.default_rng(0))
    assert torch.equal(again, images[0])


def test_a_wrist_image_is_not_moved() -> None:
    """Its rows of equal green stay rows: only colours vary."""
    for image in variants("left_wrist_0_rgb"):
        assert (image[0] - image[2]).diff(dim=0).abs().max() < 0.02


def test_another_camera_is_cropped_and_rotated() -> None:
    """The slope of red is that of the crop, and it turns by at most 5°."""
    angles = []
    for image in variants("base_0_rgb"):
        centre = (image[0] - image[1])[20:40, 20:40]
        right, down = centre.diff(dim=1).mean(), centre.diff(dim=0).mean()
        # without rotation red minus green rises to the right as it falls downwards
        angles.append(float(torch.rad2deg(torch.atan2(-down, right))) - 45)
    assert np.abs(angles).max() < 5.2 and np.std(angles) > 1.5
    assert CROP == 0.95
