"""When to wait for the other cameras' frames of one trigger."""

from __future__ import annotations

import math

ROUND_S = 0.01
"""The largest skew of the frames of one trigger."""
PATIENCE_S = 0.03
"""The longest wait for the other frames of a trigger."""
RELEARN_S = 2.0
"""Time without waits after a wait in which no complete set of frames arrived."""


class FrameSync:
    """Waits briefly for all frames of one trigger.

    Frames of cameras that are triggered together arrive one after the other; an inference that
    starts in between would combine one camera's new frame with another's last one. Cameras that
    are not triggered together never give a complete set, so a wait that fails disables waits for
    `RELEARN_S`. Times are seconds on the clock of the observation stamps.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._waiting_since_s: float | None = None
        self._no_wait_until_s = -math.inf

    def max_skew_s(self, now_s: float) -> float:
        """The largest skew of the frames of an observation that is made now."""
        if now_s < self._no_wait_until_s:
            return math.inf
        if self._waiting_since_s is not None and now_s - self._waiting_since_s >= PATIENCE_S:
            return math.inf
        return ROUND_S

    def record_incomplete(self, now_s: float) -> None:
        """The newest frames exceed `max_skew_s`: begin or continue a wait."""
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s

    def record_used(self, skew_s: float, now_s: float) -> None:
        """An observation used frames `skew_s` apart: end the wait."""
        if self._waiting_since_s is not None and skew_s > ROUND_S:
            self._no_wait_until_s = now_s + RELEARN_S
        self._waiting_since_s = None
