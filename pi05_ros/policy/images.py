"""Camera pictures → the network's input: resized, padded, scaled to [-1, 1].

Sources: LeRobot 0.6.1 `resize_with_pad_torch`, openpi `image_tools.resize_with_pad`. They differ:
LeRobot's resampling is bilinear without antialiasing on floats, openpi's is Pillow's antialiased
bilinear on bytes (mean difference 0.011, largest 0.096 of [-1, 1] for a 640×480 picture).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pi05_ros.policy.normalize import Convention

EMPTY = -1.0
"""The value of padding and of a missing camera: black."""


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of the picture inside a size×size square, its aspect ratio kept."""
    ratio = max(height / size, width / size)
    return max(1, int(height / ratio)), max(1, int(width / ratio))  # a thin line is a pixel wide


def prepare_image(
    image: NDArray[np.uint8],
    size: int,
    convention: Convention,
    device: torch.device | str = "cpu",
) -> Tensor:
    """RGB uint8 [height, width, 3] → float32 [3, size, size] in [-1, 1] on `device`.

    The picture is centred on black. One that has the right size already is only scaled.

    Raises:
        ValueError: not uint8, not [height, width, 3], or empty.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"needs uint8 RGB values 0-255, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"needs shape [height, width, 3], got {list(image.shape)}")
    if image.shape[:2] == (size, size):
        return _scale(_upload(image, device))
    if convention == "openpi":
        return _scale(_upload(_resize_pillow(image, size), device))
    return _resize_torch(_upload(image, device), size)


def _upload(image: NDArray[np.uint8], device: torch.device | str) -> Tensor:
    """[height, width, 3] → [3, height, width]: bytes, a quarter of what floats would be."""
    return torch.tensor(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)


def _scale(pixels: Tensor) -> Tensor:
    return (pixels.to(torch.float32) / 255 * 2 - 1).contiguous()


def _resize_torch(pixels: Tensor, size: int) -> Tensor:
    height, width = fitted_size(pixels.shape[1], pixels.shape[2], size)
    unit = pixels.to(torch.float32)[None] / 255
    unit = F.interpolate(unit, size=(height, width), mode="bilinear", align_corners=False)
    top, left = (size - height) // 2, (size - width) // 2
    padding = (left, size - width - left, top, size - height - top)
    return F.pad(unit[0].clamp(0, 1), padding, value=0.0) * 2 - 1


def _resize_pillow(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = fitted_size(image.shape[0], image.shape[1], size)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    return canvas
