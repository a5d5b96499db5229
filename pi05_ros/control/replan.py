"""When to infer again."""

from __future__ import annotations

import math
from dataclasses import dataclass

REPLAN_MODES = ("free", "steps", "remaining")

_TIME_TOLERANCE_S = 1e-6


@dataclass(frozen=True)
class Replan:
    """When an observation should become the next chunk.

    Whatever the mode, an inference begins in time for its chunk to arrive before the live chunks
    end, judged by the latency estimate.
    """

    mode: str = "free"
    """free: whenever the executor is; steps: after `steps` of the newest chunk; remaining: when
    no more than `remaining_s` would be left on arrival."""
    steps: int = 10
    remaining_s: float = 0.3
    interval_s: float = 0.0
    """Shortest time between two observations, in every mode."""

    def __post_init__(self) -> None:
        if self.mode not in REPLAN_MODES:
            raise ValueError(f"replan mode {self.mode!r}: choose one of {', '.join(REPLAN_MODES)}")
        if self.steps < 1:
            raise ValueError(f"replan steps must be >= 1, got {self.steps}")
        for name, value in (("remaining_s", self.remaining_s), ("interval_s", self.interval_s)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"replan_{name} must be finite and >= 0, got {value}")

    def due(self, since_s: float, left_s: float, dt_s: float, latency_s: float) -> bool:
        """Whether to infer.

        Args:
            since_s: since the observation of the newest chunk; inf before the first.
            left_s: how long the live chunks still reach.
            dt_s: a step of the newest chunk.
            latency_s: from an observation to its usable chunk, as far as known.
        """
        if since_s < self.interval_s - _TIME_TOLERANCE_S:
            return False
        left_on_arrival_s = left_s - latency_s
        if self.mode == "free" or left_on_arrival_s <= dt_s:
            return True
        if self.mode == "steps":
            return since_s >= self.steps * dt_s - _TIME_TOLERANCE_S
        return left_on_arrival_s <= self.remaining_s + _TIME_TOLERANCE_S
