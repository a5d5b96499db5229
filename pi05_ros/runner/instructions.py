"""Instructions that change faster than the policy can follow."""

from __future__ import annotations

from collections import deque

MIN_CHANGES = 3
USUAL_INFERENCE_S = 0.3
"""Before the first inference has been measured."""
_FORGET_S = 2.0
_SLACK = 1.5
"""Observation, decoding and the wait for a tick take time beside the inference."""


class InstructionChanges:
    """Counts the changes of the instruction since the last finished inference.

    An inference for an instruction that has changed meanwhile is discarded, so changes that come
    faster than inferences end leave the policy without any result.
    """

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=1000)

    def record_change(self, now_s: float) -> None:
        self._times_s.append(now_s)

    def clear(self) -> None:
        """An inference for the newest instruction has finished, or none is wanted."""
        self._times_s.clear()

    def problem(self, now_s: float, inference_s: float | None) -> str:
        """One line if at least `MIN_CHANGES` came faster than inferences of `inference_s` end."""
        times_s = self._times_s
        takes_s = USUAL_INFERENCE_S if inference_s is None else inference_s
        if len(times_s) < MIN_CHANGES or not 0 <= now_s - times_s[-1] <= _FORGET_S + takes_s:
            return ""
        if times_s[-1] - times_s[-MIN_CHANGES] > _SLACK * (MIN_CHANGES - 1) * takes_s:
            return ""
        takes = "" if inference_s is None else f", an inference takes {inference_s:.2f} s"
        return (
            f"instruction: {len(times_s)} changes in {times_s[-1] - times_s[0]:.1f} s{takes}: "
            "no instruction is followed; publish it once"
        )
