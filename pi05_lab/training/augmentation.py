"""Random crop, rotation and colours of training images, as openpi's PyTorch training has them.

Source: openpi `models_pytorch/preprocessing_pytorch.py`. Here crop, resize and rotation are one
resampling, and each image of a batch draws its own values.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import Tensor

CROP = 0.95
"""Side of the crop, share of the image's."""
ROTATION_DEG = 5.0
BRIGHTNESS, CONTRAST, SATURATION = (0.7, 1.3), (0.6, 1.4), (0.5, 1.5)


def augment(image: Tensor, camera: str, rng: np.random.Generator) -> Tensor:
    """A random variant of an image [3, side, side] in [-1, 1].

    `camera` is the network's name: the images of wrist cameras are not cropped or rotated, because
    their geometry relates the gripper to the object.
    """
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()) / 2 + 0.5
    if "wrist" not in camera:
        pixels = _warp(pixels, rng)
    pixels *= rng.uniform(*BRIGHTNESS)
    mean = pixels.mean()
    pixels = mean + (pixels - mean) * rng.uniform(*CONTRAST)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(*SATURATION)
    varied = np.clip(pixels, 0, 1).astype(np.float32) * 2 - 1
    return torch.from_numpy(varied).permute(2, 0, 1)


def _warp(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop a square at random, scale it to the image's size, and rotate it."""
    side = pixels.shape[0]
    crop = int(side * CROP)
    left, top = rng.integers(0, side - crop + 1, 2)
    angle = math.radians(rng.uniform(-ROTATION_DEG, ROTATION_DEG))
    # From the centre of the result to that of the crop; pixel centres are at whole numbers.
    turn = (
        crop
        / side
        * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    )
    centre = (side - 1) / 2
    offset = np.array([left, top]) + (crop - 1) / 2 - turn @ [centre, centre]
    matrix = np.column_stack((turn, offset))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, (side, side), flags=flags, borderValue=(0, 0, 0))
