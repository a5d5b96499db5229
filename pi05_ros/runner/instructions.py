"""Instructions that change faster than the policy can follow."""

from __future__ import annotations

import math
from collections import deque

MIN_CHANGES = 3
FORGET_S = 2.0
"""So long after the last change another problem prevents inference."""


class InstructionChanges:
    """Counts changes of the instruction that discard an inference, since one last finished.

    An inference in flight for an instruction that has changed is discarded: the executor cannot
    abort it, so the next one begins at the same time either way, and the arms never move for an
    outdated instruction. Changes that come faster than inferences end leave no result at all.
    """

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=1000)

    def record_discard(self, now_s: float) -> None:
        """A changed instruction discards an inference in flight."""
        if math.isfinite(now_s):
            self._times_s.append(now_s)

    def clear(self) -> None:
        """An inference for the newest instruction has finished, or none is wanted."""
        self._times_s.clear()

    def problem(self, now_s: float, inference_s: float | None) -> str:
        """One line if at least `MIN_CHANGES` have discarded inferences of `inference_s`."""
        times_s = self._times_s
        if len(times_s) < MIN_CHANGES:
            return ""
        if not 0 <= now_s - times_s[-1] <= FORGET_S + (inference_s or 0.0):
            return ""
        takes = "" if inference_s is None else f", an inference takes {inference_s:.2f} s"
        return (
            f"instruction: {len(times_s)} changes in {times_s[-1] - times_s[0]:.1f} s{takes}: "
            "no instruction is followed; publish it once"
        )
