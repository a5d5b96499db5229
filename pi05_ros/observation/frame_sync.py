"""Whether to infer on the newest frames as they are, or to wait for the rest of their round."""

from __future__ import annotations

import math

ROUND_S = 0.01
"""Frames of one round of all cameras are stamped within this, if somebody triggers them."""
PATIENCE_S = 0.03
"""The rest of a round comes within this, or the cameras have no rounds."""
RELEARN_S = 2.0
"""How long cameras that had no round are taken as they come."""


class FrameSync:
    """Cameras that are triggered together are looked through together.

    Their messages arrive one after the other, and an inference that begins in between would see one
    camera a whole period later than the next. Where no round comes about, because each camera runs
    by its own clock, nothing is waited for until `RELEARN_S` later.

    All times are seconds on the clock of the observation stamps.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over, as after a jump of the clock."""
        self._since_s: float | None = None
        self._none_until_s = -math.inf

    def within_s(self, now_s: float) -> float:
        """How far apart the frames of an observation made now may be stamped."""
        if now_s < self._none_until_s:
            return math.inf
        if self._since_s is not None and now_s - self._since_s >= PATIENCE_S:
            return math.inf
        return ROUND_S

    def missed(self, now_s: float) -> None:
        """The newest frames are farther apart than `within_s`: the rest is waited for."""
        if self._since_s is None:
            self._since_s = now_s

    def taken(self, skew_s: float, now_s: float) -> None:
        """Frames `skew_s` apart were taken."""
        if self._since_s is not None and skew_s > ROUND_S:
            self._none_until_s = now_s + RELEARN_S
        self._since_s = None
