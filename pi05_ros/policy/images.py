"""Camera images → the network's input: resized, padded, scaled to [-1, 1].

Sources: LeRobot 0.6.1 `resize_with_pad_torch`, openpi `image_tools.resize_with_pad`. They differ:
LeRobot resamples floats bilinearly without antialiasing, openpi bytes with Pillow's antialiased
bilinear filter (mean difference 0.011, largest 0.096 of [-1, 1] for a 640×480 image).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pi05_ros.policy.inference import Mark
from pi05_ros.policy.processing import Convention
from pi05_ros.types import ImageArray

EMPTY = -1.0
"""The value of padding and of a missing camera: black."""


class ImageError(ValueError):
    """An invalid image; `index` is its row."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class ImageLoader:
    """Uploads images to the network's device and prepares them there."""

    def __init__(self, size: int, convention: Convention, device: torch.device) -> None:
        self._size = size
        self._convention: Convention = convention
        self._device = device
        self._staged: dict[int, Tensor] = {}

    def load(self, images: Mapping[int, ImageArray], into: Tensor, mark: Mark) -> None:
        """Prepare each image into its row of [n, 3, size, size] on the device.

        A GPU receives bytes from pinned memory, a quarter of the size of floats, and resizes
        them itself. Ends the stages "upload" and "resize".

        Raises:
            ImageError: not uint8 [height, width, 3], or empty.
        """
        for index, image in images.items():
            try:
                check_image(image)
            except ValueError as error:
                raise ImageError(index, str(error)) from None
        on_gpu = self._device.type != "cpu"
        uploaded = {i: self._upload(i, image) for i, image in images.items()} if on_gpu else {}
        mark("upload")
        for index, image in images.items():
            if on_gpu:
                into[index] = prepare_on_device(uploaded[index], self._size, self._convention)
            else:
                into[index] = prepare_image(image, self._size, self._convention)
        mark("resize")

    def _upload(self, index: int, image: ImageArray) -> Tensor:
        staged = self._staged.get(index)
        if staged is None or staged.shape != image.shape:
            staged = torch.empty(image.shape, dtype=torch.uint8, pin_memory=True)
            self._staged[index] = staged
        np.copyto(staged.numpy(), image)
        return staged.to(self._device, non_blocking=True)


def check_image(image: ImageArray) -> None:
    """Raise ValueError for an array that is not uint8 [height, width, 3], or empty."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"needs uint8 RGB values 0-255, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"needs shape [height, width, 3], got {list(image.shape)}")


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of the image inside a size×size square, its aspect ratio kept."""
    ratio = max(height / size, width / size)
    return max(1, int(height / ratio)), max(1, int(width / ratio))


def prepare_image(image: ImageArray, size: int, convention: Convention) -> Tensor:
    """RGB uint8 [height, width, 3] → float32 [3, size, size] in [-1, 1] on the CPU.

    The image is centred on black. An image of the right size is not resampled.

    Raises:
        ValueError: not uint8, not [height, width, 3], or empty.
    """
    check_image(image)
    height, width = fitted_size(image.shape[0], image.shape[1], size)
    if image.shape[:2] == (size, size):
        fitted = _to_unit(image)
    elif convention == "openpi":
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        fitted = _to_unit(np.asarray(resized))
    else:
        fitted = _resize_bilinear(image, height, width)
    return _center(torch.from_numpy(fitted).permute(2, 0, 1), size)


def prepare_on_device(pixels: Tensor, size: int, convention: Convention) -> Tensor:
    """Like `prepare_image`, for uint8 [height, width, 3] on any device.

    openpi's resampling is done in floats: at most one step of a byte from Pillow's.
    """
    height, width = fitted_size(pixels.shape[0], pixels.shape[1], size)
    fitted = pixels.permute(2, 0, 1)[None].to(torch.float32)
    if (height, width) != tuple(fitted.shape[2:]):
        antialias = convention == "openpi"
        fitted = F.interpolate(
            fitted, size=(height, width), mode="bilinear", align_corners=False, antialias=antialias
        )
        if antialias:
            fitted = fitted.round()
    return _center(fitted[0] / 255, size)


def _center(fitted: Tensor, size: int) -> Tensor:
    """[3, height, width] in [0, 1] → [3, size, size] in [-1, 1], padded with black."""
    height, width = fitted.shape[1:]
    top, left = (size - height) // 2, (size - width) // 2
    padding = (left, size - width - left, top, size - height - top)
    return F.pad(fitted * 2 - 1, padding, value=EMPTY).contiguous()


def _to_unit(pixels: ImageArray) -> NDArray[np.float32]:
    return np.divide(pixels, 255, dtype=np.float32)


def _resize_bilinear(image: ImageArray, height: int, width: int) -> NDArray[np.float32]:
    """[height, width, 3] in [0, 1], without antialiasing.

    Reads only the four neighbours of each new pixel, a tenth of a 640×480 image.
    """
    rows, below, down = _neighbours(image.shape[0], height)
    columns, right, across = _neighbours(image.shape[1], width)
    down, across = down[:, None, None], across[None, :, None]

    def mixed(row: NDArray[np.int64]) -> NDArray[np.float32]:
        lines = image[row]
        return _to_unit(lines[:, columns]) * (1 - across) + _to_unit(lines[:, right]) * across

    fitted: NDArray[np.float32] = mixed(rows) * (1 - down) + mixed(below) * down
    return fitted


@functools.lru_cache(maxsize=64)
def _neighbours(
    old: int, new: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Along one axis: each new pixel's first and second neighbour, and the second one's weight."""
    # In float64 and rounded once, like torch's fused multiply-add.
    scale = np.float64(np.float32(old) / np.float32(new))
    position = np.maximum((np.arange(new) + 0.5) * scale - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (position - first).astype(np.float32)
