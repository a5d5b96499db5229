"""One camera's images that cannot be true: repeated to the byte, of one colour, or undecodable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_ros.types import ImageArray

MIN_REPETITIONS = 2
"""Images equal to the one before; a slow camera that repeats one image once is not frozen."""

SAMPLE_STEP = 509
"""Bytes between two compared ones. A prime, so that rows and channels are hit at all offsets."""

COLOUR_SAMPLES = 32
"""Compared pixels in each direction; fewer in a smaller image."""

COLOUR_SPREAD = 1
"""Grey values between the least and the largest of one channel in an image of one colour."""


@dataclass(frozen=True)
class ImageRules:
    """Which images are taken for a camera's fault."""

    frozen_after_s: float = 0.0
    """Equal images for so long are a fault; 0 accepts them."""
    refuse_one_colour: bool = False
    unusable_after_s: float = 1.0
    """A fault that lasts so long makes the images unusable."""


@dataclass(frozen=True)
class ImageFault:
    """What is wrong with a camera's images."""

    text: str
    unusable: bool
    """No inference should use them."""


class ImageWatch:
    """What one camera's images look like, as they arrive and as they are decoded.

    Its owner holds the lock. Times are the images' stamps.
    """

    def __init__(self, rules: ImageRules) -> None:
        self._rules = rules
        self._content: Any = None
        self._same_since_s = self._newest_s = 0.0
        self._repetitions = 0
        self._colour: ImageFault | None = None
        self._colour_since_s = 0.0
        self._undecodable = ""

    @property
    def content(self) -> Any:
        """The newest image's bytes, to compare the next one's with."""
        return self._content

    def arrived(self, stamp_s: float, content: Any, same: bool) -> None:
        """Take the newest image's bytes, and whether they equal those before."""
        if same and stamp_s > self._newest_s:
            self._repetitions += 1
        else:
            self._repetitions, self._same_since_s = 0, stamp_s
        self._newest_s, self._content = stamp_s, content

    def decoded(self, stamp_s: float, image: ImageArray) -> ImageFault | None:
        """Take a decoded image [height, width, 3]; its fault, if it has one."""
        self._undecodable = ""
        if not (self._rules.refuse_one_colour and is_one_colour(image)):
            self._colour = None
            return None
        if self._colour is None or stamp_s < self._colour_since_s:
            self._colour_since_s = stamp_s
        self._colour = ImageFault(
            "the image has one colour; check lens cap, light, exposure and cable, or set "
            "faults.refuse_one_colour to false",
            unusable=stamp_s - self._colour_since_s >= self._rules.unusable_after_s,
        )
        return self._colour

    def undecodable(self, reason: str) -> None:
        """Take why an image could not be decoded."""
        self._undecodable = reason

    def forget_decoded(self) -> None:
        """What earlier images were decoded to says nothing of the next."""
        self._undecodable, self._colour = "", None

    def frozen(self) -> ImageFault | None:
        """The fault of images that repeat."""
        lasted_s, after_s = self._newest_s - self._same_since_s, self._rules.frozen_after_s
        if not (0 < after_s <= lasted_s and self._repetitions >= MIN_REPETITIONS):
            return None
        return ImageFault(
            f"images are equal to the byte for more than {after_s:g} s; check the camera and its "
            "driver, or set faults.frozen_image_s to 0 for a source without noise",
            unusable=lasted_s >= after_s + self._rules.unusable_after_s,
        )

    def faults(self) -> list[str]:
        """What is wrong at the moment."""
        found = [fault.text for fault in (self.frozen(), self._colour) if fault is not None]
        return [*found, self._undecodable] if self._undecodable else found


def same_bytes(first: Any, second: Any) -> bool:
    """Whether two buffers are equal; a sample of their bytes decides in most cases."""
    if first is None or second is None or len(first) != len(second):
        return False
    one, other = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    if not np.array_equal(one[::SAMPLE_STEP], other[::SAMPLE_STEP]):
        return False
    return bool(np.array_equal(one, other))


def is_one_colour(image: ImageArray) -> bool:
    """Whether a sample of the pixels [height, width, 3] has one colour, within one grey value."""
    height, width = image.shape[:2]
    sample = image[:: max(1, height // COLOUR_SAMPLES), :: max(1, width // COLOUR_SAMPLES)]
    channels = np.ascontiguousarray(sample.transpose(2, 0, 1)).reshape(image.shape[2], -1)
    return bool((channels.max(axis=1) - channels.min(axis=1) <= COLOUR_SPREAD).all())
