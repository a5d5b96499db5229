"""How recordings are evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class OfflineSettings:
    """Settings of an evaluation; the same ones and the same recording give the same figures.

    Raises:
        ValueError: a value is out of range.
    """

    every_s: float = 0.2
    """Recorded time between two observations that are inferred on."""
    delay_s: float = 0.1
    """From an observation's stamp to its usable chunk, for the schedulers."""
    schedulers: tuple[str, ...] = ()
    """None: the params file's."""
    control_every: int = 4
    """Every so many observations are repeated with another instruction and with black pictures;
    0 never."""
    black_each: bool = True
    """Also with each camera alone black."""
    others: tuple[str, ...] = ()
    """Instructions to choose the other one from."""
    worst: int = 3
    """Moments that are shown."""
    seed: int = 0
    timings: bool = True
    """Measured times in the result; without them two runs give the same bytes."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.every_s) and self.every_s > 0):
            raise ValueError(f"every_s must be above 0, got {self.every_s}")
        if not (math.isfinite(self.delay_s) and self.delay_s >= 0):
            raise ValueError(f"delay_s must be at least 0, got {self.delay_s}")
        if self.control_every < 0 or self.worst < 0:
            raise ValueError("control_every and worst must be at least 0")
