"""Detects images that a working camera does not deliver: frozen, of one colour, undecodable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_ros.types import ImageArray

MIN_REPETITIONS = 2
"""Repeated images of a frozen camera; a slow camera may repeat one."""
SAMPLE_STEP = 509
"""Bytes between two compared ones; a prime, so the samples cover all columns and channels."""
COLOUR_SAMPLES = 32
"""Compared pixels in each direction."""
COLOUR_SPREAD = 1
"""Largest difference within a channel of an image of one colour."""


@dataclass(frozen=True)
class ImageRules:
    """Which images are a camera's fault."""

    frozen_after_s: float = 0.0
    """Equal images for this time are a fault; 0 accepts them."""
    refuse_one_colour: bool = False
    unusable_after_s: float = 1.0
    """A fault that lasts this long makes the images unusable."""


@dataclass(frozen=True)
class ImageFault:
    """What is wrong with a camera's images."""

    text: str
    unusable: bool
    """Inference must not use them."""


class ImageWatch:
    """Checks one camera's images on arrival and after decoding.

    Not thread safe. Times are the images' stamps.
    """

    def __init__(self, rules: ImageRules) -> None:
        self._rules = rules
        self.content: Any = None
        """The newest image's bytes, for the comparison with the next one's."""
        self._same_since_s = self._newest_s = 0.0
        self._repetitions = 0
        self._colour: ImageFault | None = None
        self._colour_since_s = 0.0
        self._undecodable = ""

    def record_arrival(self, stamp_s: float, content: Any, same: bool) -> None:
        """Record the newest image's bytes; `same`: they equal `content` before."""
        if same and stamp_s > self._newest_s:
            self._repetitions += 1
        else:
            self._repetitions, self._same_since_s = 0, stamp_s
        self._newest_s, self.content = stamp_s, content

    def record_decoded(self, stamp_s: float, image: ImageArray) -> ImageFault | None:
        """Record a decoded image [height, width, 3] and return its fault."""
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

    def record_undecodable(self, reason: str) -> None:
        self._undecodable = reason

    def reset_decoded(self) -> None:
        """Drop the faults that were found by decoding."""
        self._undecodable, self._colour = "", None

    def frozen(self) -> ImageFault | None:
        """The fault of repeated images."""
        lasted_s, after_s = self._newest_s - self._same_since_s, self._rules.frozen_after_s
        if not (0 < after_s <= lasted_s and self._repetitions >= MIN_REPETITIONS):
            return None
        return ImageFault(
            f"images are equal to the byte for more than {after_s:g} s; check the camera and its "
            "driver, or set faults.frozen_image_s to 0 for a source without noise",
            unusable=lasted_s >= after_s + self._rules.unusable_after_s,
        )

    def faults(self) -> list[str]:
        """All present faults, one line each."""
        found = [fault.text for fault in (self.frozen(), self._colour) if fault is not None]
        return [*found, self._undecodable] if self._undecodable else found


def same_bytes(first: Any, second: Any) -> bool:
    """Whether two buffers are equal; samples their bytes first."""
    if first is None or second is None or len(first) != len(second):
        return False
    one, other = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    if not np.array_equal(one[::SAMPLE_STEP], other[::SAMPLE_STEP]):
        return False
    return bool(np.array_equal(one, other))


def is_one_colour(image: ImageArray) -> bool:
    """Whether a sample of the pixels [height, width, 3] stays within `COLOUR_SPREAD`."""
    height, width = image.shape[:2]
    sample = image[:: max(1, height // COLOUR_SAMPLES), :: max(1, width // COLOUR_SAMPLES)]
    channels = np.ascontiguousarray(sample.transpose(2, 0, 1)).reshape(image.shape[2], -1)
    return bool((channels.max(axis=1) - channels.min(axis=1) <= COLOUR_SPREAD).all())
