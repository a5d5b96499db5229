"""One stream of stamped items: order, age, rate, and jumps of the clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

RATE_WINDOW_S = 2.0
PERIOD_WINDOW = 15
"""Intervals of which the median is the stream's period."""
CLOCK_JUMP_S = 1.0
"""Longer than network reordering, shorter than a bag's loop or a simulator's reset."""

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
        while self._items[0].stamp_s < stamp_s - self._history_s:
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
