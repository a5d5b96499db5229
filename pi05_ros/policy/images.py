"""Camera pictures → the network's input: resized, padded, scaled to [-1, 1].

Sources: LeRobot 0.6.1 `resize_with_pad_torch`, openpi `image_tools.resize_with_pad`. They differ:
LeRobot's resampling is bilinear without antialiasing on floats, openpi's is Pillow's antialiased
bilinear on bytes (mean difference 0.011, largest 0.096 of [-1, 1] for a 640×480 picture).
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

EMPTY = -1.0
"""The value of padding and of a missing camera: black."""


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of the picture inside a size×size square, its aspect ratio kept."""
    ratio = max(height / size, width / size)
    return max(1, int(height / ratio)), max(1, int(width / ratio))  # a thin line is a pixel wide


def prepare_image(image: NDArray[np.uint8], size: int, convention: Convention) -> Tensor:
    """RGB uint8 [height, width, 3] → float32 [3, size, size] in [-1, 1] on the CPU.

    The picture is centred on black. One that has the right size already is only scaled.

    Raises:
        ValueError: not uint8, not [height, width, 3], or empty.
    """
    check_picture(image)
    if image.shape[:2] == (size, size):
        fitted = _unit(image)
    elif convention == "openpi":
        fitted = _resize_pillow(image, size)
    else:
        fitted = _resize_bilinear(image, *fitted_size(image.shape[0], image.shape[1], size))
    return _center(torch.from_numpy(fitted).permute(2, 0, 1), size)


def prepare_on_device(pixels: Tensor, size: int, convention: Convention) -> Tensor:
    """uint8 [height, width, 3] → what `prepare_image` makes, where the pixels are.

    openpi's resampling in floats: at most one step of a byte beside Pillow's.
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


class PictureLoader:
    """Brings pictures to the network's device and prepares them there."""

    def __init__(self, size: int, convention: Convention, device: torch.device) -> None:
        self._size = size
        self._convention: Convention = convention
        self._device = device
        self._staged: dict[int, Tensor] = {}

    def load(self, pictures: Mapping[int, NDArray[np.uint8]], into: Tensor, mark: Mark) -> None:
        """Prepare each picture into its row of [n, 3, size, size] on the device.

        A GPU is given bytes from pinned memory, a quarter of what floats would be, and resizes
        them itself. Ends the stages "upload" and "resize".

        Raises:
            PictureError: not a picture; it says which.
        """
        for index, picture in pictures.items():
            try:
                check_picture(picture)
            except ValueError as error:
                raise PictureError(index, str(error)) from None
        if self._device.type == "cpu":
            mark("upload")
            for index, picture in pictures.items():
                into[index] = prepare_image(picture, self._size, self._convention)
        else:
            uploaded = {i: self._upload(i, picture) for i, picture in pictures.items()}
            mark("upload")
            for index, pixels in uploaded.items():
                into[index] = prepare_on_device(pixels, self._size, self._convention)
        mark("resize")

    def _upload(self, index: int, picture: NDArray[np.uint8]) -> Tensor:
        staged = self._staged.get(index)
        if staged is None or staged.shape != picture.shape:
            staged = torch.empty(picture.shape, dtype=torch.uint8, pin_memory=True)
            self._staged[index] = staged
        np.copyto(staged.numpy(), picture)
        return staged.to(self._device, non_blocking=True)


class PictureError(ValueError):
    """A picture that the network cannot take."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def check_picture(image: NDArray[np.uint8]) -> None:
    """Raise ValueError for what is not uint8 [height, width, 3], or empty."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"needs uint8 RGB values 0-255, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"needs shape [height, width, 3], got {list(image.shape)}")


def _center(fitted: Tensor, size: int) -> Tensor:
    """[3, height, width] of [0, 1] → [3, size, size] of [-1, 1], around it black."""
    height, width = fitted.shape[1:]
    top, left = (size - height) // 2, (size - width) // 2
    padding = (left, size - width - left, top, size - height - top)
    return F.pad(fitted * 2 - 1, padding, value=EMPTY).contiguous()


def _unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.divide(pixels, 255, dtype=np.float32)


def _resize_bilinear(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float32]:
    """[height, width, 3] of [0, 1], without antialiasing.

    Only the four neighbours of each new pixel are read: of a 640×480 picture, a tenth of what
    converting it whole would take.
    """
    rows, below, down = _neighbours(image.shape[0], height)
    columns, right, across = _neighbours(image.shape[1], width)
    down, across = down[:, None, None], across[None, :, None]

    def mixed(row: NDArray[np.int64]) -> NDArray[np.float32]:
        lines = image[row]
        return _unit(lines[:, columns]) * (1 - across) + _unit(lines[:, right]) * across

    fitted: NDArray[np.float32] = mixed(rows) * (1 - down) + mixed(below) * down
    return fitted


@functools.lru_cache(maxsize=64)
def _neighbours(
    old: int, new: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Along one axis: each new pixel's first and second neighbour, and the second one's share."""
    # in float64 and rounded once, as torch's fused multiply-add is
    scale = np.float64(np.float32(old) / np.float32(new))
    position = np.maximum((np.arange(new) + 0.5) * scale - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (position - first).astype(np.float32)


def _resize_pillow(image: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    height, width = fitted_size(image.shape[0], image.shape[1], size)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return _unit(np.asarray(resized))
