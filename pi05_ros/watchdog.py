"""Detects hung inference and repeated failures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi05_ros.device_errors import ErrorKind
from pi05_ros.executor import InferenceResult


@dataclass(frozen=True)
class Fault:
    """Why the motion must end."""

    message: str
    """One line for the user."""
    device: bool
    """The policy must be loaded again: its device failed, or its thread ended."""
    sticky: bool = False
    """The device fails until the process ends: only a new process can load a policy."""


class Watchdog:
    """Detects hung inferences and repeated failures. No method waits.

    An inference is hung while it takes longer than `hang_timeout_s`. `max_failures` failures in a
    row are a fault, and so is one that lost the device. An observation that cannot be made,
    because an image is damaged, is no failure of the policy.
    """

    def __init__(self, hang_timeout_s: float = 2.0, max_failures: int = 3) -> None:
        """Raises ValueError for a time that is not above 0 or a count below 1."""
        if not (math.isfinite(hang_timeout_s) and hang_timeout_s > 0):
            raise ValueError(f"hang_timeout_s must be finite and > 0, got {hang_timeout_s}")
        if max_failures < 1:
            raise ValueError(f"max_failures must be at least 1, got {max_failures}")
        self.hang_timeout_s = hang_timeout_s
        self.max_failures = max_failures
        self.hangs = 0
        self._hung_since_s: float | None = None
        self._failures = 0

    def hang(self, busy_since_s: float | None, now_s: float) -> str | None:
        """Describe the present hang; None without one. Times by time.monotonic."""
        if busy_since_s is None or now_s - busy_since_s <= self.hang_timeout_s:
            return None
        busy_s = now_s - busy_since_s
        return f"policy: no answer for {busy_s:.1f} s, limit {self.hang_timeout_s:g} s"

    def check_hang(self, busy_since_s: float | None, now_s: float) -> str | None:
        """Count and describe a hang that begins now; None without a new one."""
        hang = self.hang(busy_since_s, now_s)
        if hang is None or self._hung_since_s == busy_since_s:
            return None
        self._hung_since_s = busy_since_s
        self.hangs += 1
        return hang

    def record_result(self, result: InferenceResult) -> Fault | None:
        """Count a result; return the fault that it causes."""
        if result.chunk is not None:
            self._failures = 0
        elif result.kind is ErrorKind.STICKY:
            return Fault(f"the device is lost: {result.error}", device=True, sticky=True)
        elif result.stamp_s is not None or result.kind is ErrorKind.OUT_OF_MEMORY:
            self._failures += 1
        if self._failures < self.max_failures:
            return None
        return Fault(
            f"{self._failures} inferences failed in a row, the last with {result.error}",
            device=False,
        )

    def reset(self) -> None:
        """Drop the failures counted so far, at a new activation."""
        self._failures = 0
