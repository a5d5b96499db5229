"""How fast a plan is executed: its own time, which can be slowed down, held and resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pi05_ros.types import FloatArray

_MAX_SEGMENTS = 32
"""Changes of speed that are remembered; a chunk's observation is seldom older than the last two."""


@dataclass(frozen=True)
class _Segment:
    """From one change of speed to the next: the rate runs from `rate` to `target`, then stays."""

    start_s: float
    plan_s: float
    rate: float
    target: float
    ramp_s: float
    """How long the rate changes."""

    def plan(self, times_s: FloatArray) -> FloatArray:
        since_s = times_s - self.start_s
        ramped_s = np.minimum(since_s, self.ramp_s)
        way_s = self.rate * ramped_s
        if self.ramp_s > 0:
            slope = (self.target - self.rate) / self.ramp_s
            way_s = way_s + 0.5 * slope * np.maximum(ramped_s, 0.0) ** 2
        rest_s = np.maximum(since_s - self.ramp_s, 0.0)
        return np.asarray(self.plan_s + way_s + self.target * rest_s)

    def rate_at(self, time_s: float) -> float:
        if self.ramp_s <= 0 or time_s >= self.start_s + self.ramp_s:
            return self.target
        share = max(0.0, (time_s - self.start_s) / self.ramp_s)
        return self.rate + share * (self.target - self.rate)


class PlanClock:
    """The time that a plan has reached, `scale` seconds a second.

    The scale goes from 0, where the plan stands, to 1, where chunks are executed as fast as they
    were meant. A change is a ramp of the rate, so position and velocity of whatever follows the
    plan are continuous. At a scale of 1 from the start, the plan's time is the clock's.

    Any thread may read while one thread writes: the changes of speed are one immutable tuple,
    never empty, which a writer replaces by one assignment and a reader reads once.
    """

    def __init__(self, scale: float = 1.0, ramp_s: float = 0.5) -> None:
        """`ramp_s`: how long a change from 0 to 1 takes. Raises ValueError out of range."""
        if not (math.isfinite(ramp_s) and ramp_s >= 0):
            raise ValueError(f"speed_ramp_s must be finite and >= 0, got {ramp_s}")
        self._ramp_s = ramp_s
        self._scale = _checked(scale)
        self._segments: tuple[_Segment, ...] = ()
        self.reset()

    @property
    def scale(self) -> float:
        """What was asked for last."""
        return self._scale

    def rate(self, now_s: float) -> float:
        """Plan seconds per second at `now_s`, on the way to `scale`."""
        return self._segments[-1].rate_at(now_s)

    def set_scale(self, scale: float, now_s: float) -> None:
        """Go to another speed from `now_s` on. Raises ValueError outside 0 to 1."""
        self._scale = _checked(scale)
        rate = self.rate(now_s)
        ramp_s = abs(scale - rate) * self._ramp_s
        change = _Segment(now_s, self.plan_s(now_s), rate, scale, ramp_s)
        self._segments = (*self._segments[1 - _MAX_SEGMENTS :], change)

    def reset(self) -> None:
        """Begin at full scale without a ramp, as for a robot that stands."""
        self._segments = (_Segment(0.0, 0.0, self._scale, self._scale, 0.0),)

    def plan_s(self, time_s: float) -> float:
        """The plan's time at one time; times before the oldest change that is known ran as it."""
        return float(self.plan_times_s(time_s))

    def plan_times_s(self, times_s: ArrayLike) -> FloatArray:
        """The plan's times, of any shape, also of times to come if the speed is not changed."""
        times = np.asarray(times_s, dtype=np.float64)
        first, *changes = self._segments
        plan = first.plan(times)
        for segment in changes:
            plan = np.where(times >= segment.start_s, segment.plan(times), plan)
        return plan


def _checked(scale: float) -> float:
    if not 0 <= scale <= 1:
        raise ValueError(f"speed_scale must be from 0 to 1, got {scale}")
    return float(scale)
