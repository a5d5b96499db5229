"""The image tower; faults: a scaled projector, patches in another order, another gelu or norm."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pi05_ros.policy.config import Sizes
from pi05_ros.policy.model import VisionTower


@torch.inference_mode()
def test_features_match_lerobot(golden: SimpleNamespace) -> None:
    for camera in golden.model.config.cameras:
        features = golden.model.vision(golden.inputs[f"image.{camera}"])
        expected = golden.outputs[f"image_features.{camera}"]
        assert features.shape == (2, 256, 64)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_other_picture_and_patch(small_sizes: Sizes) -> None:
    tower = VisionTower(small_sizes)
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    features = tower(images)
    assert features.shape == (2, 49, 48)
    # Each picture is encoded for itself.
    torch.testing.assert_close(tower(images[1:]), features[1:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_patches_run_row_by_row(small_sizes: Sizes) -> None:
    """Without layers and positions a token is its patch alone."""
    tower = VisionTower(small_sizes)
    tower.layers = torch.nn.ModuleList()
    tower.position.zero_()
    images = torch.zeros(1, 3, 112, 112)
    images[:, :, 16 * 2 : 16 * 3, 16 * 5 : 16 * 6] = 1.0
    features = tower(images)[0]
    changed = (features - tower(torch.zeros(1, 3, 112, 112))[0]).abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [2 * 7 + 5]
