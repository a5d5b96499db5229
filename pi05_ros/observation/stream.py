"""What can be wrong with a stream: its stamps, and the images of a camera.

`Stream` checks order, age, rate and jumps of the clock. `ImageWatch` detects images that a working
camera does not deliver: frozen, of one colour, undecodable.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from pi05_ros.types import ImageArray

RATE_WINDOW_S = 2.0
PERIOD_WINDOW = 15
"""Intervals of which the median is the stream's period."""
CLOCK_JUMP_S = 1.0
"""Longer than network reordering, shorter than a bag's loop or a simulator's reset."""
MIN_REPETITIONS = 2
"""Repeated images of a frozen camera; a slow camera may repeat one."""
SAMPLE_STEP = 509
"""Bytes between two compared ones; a prime, so the samples cover all columns and channels."""
COLOUR_SAMPLES = 32
"""Compared pixels in each direction."""
COLOUR_SPREAD = 1
"""Largest difference within a channel of an image of one colour."""

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class StreamStatistics:
    """Diagnostics of a stream."""

    received: int
    rate_hz: float
    """By stamps over the last 2 s."""
    age_s: float
    """Of the newest item; infinite without one."""
    used: int
    """Items that a snapshot used, each counted once."""
    clock_jumps: int
    """How often the stamps went back by more than 1 s."""
    lost: int
    """Items missing between stamps, by the median period; gaps above 2 s are not counted."""


@dataclass(frozen=True)
class Stamped(Generic[Payload]):
    """An item with its stamp."""

    stamp_s: float
    payload: Payload


class Stream(Generic[Payload]):
    """One stream's recent items in the order of their stamps. Not thread safe."""

    def __init__(self, history_s: float) -> None:
        self._history_s = history_s
        self._items: deque[Stamped[Payload]] = deque()
        self._stamps_s: deque[float] = deque()
        self._received = 0
        self._used = 0
        self._clock_jumps = 0
        self._lost = 0
        self._intervals_s: deque[float] = deque(maxlen=PERIOD_WINDOW)
        self._last_used_s = -math.inf

    @property
    def newest(self) -> Stamped[Payload] | None:
        return self._items[-1] if self._items else None

    @property
    def oldest(self) -> Stamped[Payload] | None:
        return self._items[0] if self._items else None

    def put(self, stamp_s: float, payload: Payload) -> bool:
        """Count the item, and keep it if it is later than the newest; returns whether it was."""
        self._received += 1
        newest = self.newest
        if newest is not None and stamp_s <= newest.stamp_s:
            if stamp_s >= newest.stamp_s - CLOCK_JUMP_S:
                return False
            self.clear()
            self._clock_jumps += 1
        elif newest is not None:
            self._count_loss(stamp_s - newest.stamp_s)
        self._items.append(Stamped(stamp_s, payload))
        # one item from before the history is the newest one at its beginning
        while len(self._items) > 1 and self._items[1].stamp_s <= stamp_s - self._history_s:
            self._items.popleft()
        self._stamps_s.append(stamp_s)
        while self._stamps_s[0] < stamp_s - RATE_WINDOW_S:
            self._stamps_s.popleft()
        return True

    def clear(self) -> None:
        self._items.clear()
        self._stamps_s.clear()
        self._intervals_s.clear()
        self._last_used_s = -math.inf

    def _count_loss(self, interval_s: float) -> None:
        if interval_s > RATE_WINDOW_S:
            return
        known_s = sorted(self._intervals_s)
        if len(known_s) >= PERIOD_WINDOW // 3:
            self._lost += max(0, round(interval_s / known_s[len(known_s) // 2]) - 1)
        self._intervals_s.append(interval_s)

    def nearest(self, stamp_s: float) -> Stamped[Payload]:
        return min(self._items, key=lambda item: abs(item.stamp_s - stamp_s))

    def fault(self, now_s: float, max_age_s: float) -> str | None:
        """What is wrong with the newest item's age."""
        newest = self.newest
        if newest is None:
            return "nothing received"
        age_s = now_s - newest.stamp_s
        if age_s > max_age_s:
            if newest.stamp_s == 0:
                return "stamps are 0, the driver must fill header.stamp"
            return f"newest is {age_s:.3f} s old, limit {max_age_s:.3f} s"
        if not age_s >= -max_age_s:
            return (
                f"stamp is {-age_s:.3f} s in the future, limit {max_age_s:.3f} s; "
                "check the clocks and use_sim_time"
            )
        return None

    def mark_used(self, stamp_s: float) -> None:
        if stamp_s != self._last_used_s:
            self._used += 1
            self._last_used_s = stamp_s

    def statistics(self, now_s: float) -> StreamStatistics:
        stamps_s = [stamp_s for stamp_s in self._stamps_s if stamp_s >= now_s - RATE_WINDOW_S]
        span_s = stamps_s[-1] - stamps_s[0] if stamps_s else 0.0
        return StreamStatistics(
            received=self._received,
            rate_hz=(len(stamps_s) - 1) / span_s if span_s > 0 else 0.0,
            age_s=math.inf if self.newest is None else now_s - self.newest.stamp_s,
            used=self._used,
            clock_jumps=self._clock_jumps,
            lost=self._lost,
        )


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
