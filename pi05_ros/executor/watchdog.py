"""Whether the policy still answers, and answers with something that can be used."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi05_ros.executor.device_errors import ErrorKind
from pi05_ros.executor.results import InferenceResult


@dataclass(frozen=True)
class Fault:
    """Why the motion must end; one line for a person."""

    message: str
    device: bool
    """The policy must be loaded again: its device failed, or its thread ended."""
    sticky: bool = False
    """The device fails until the process ends: only a new process can load a policy."""


class Watchdog:
    """Looks at the executor from outside; nothing here waits.

    An inference that takes longer than `hang_timeout_s` counts as hung until it returns. After
    `max_failures` failed ones in a row there is a fault, after one that lost the device there is
    one at once. An observation that could not be made, because an image is damaged, is not the
    policy's failure.
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
        self._known_s: float | None = None
        self._failures = 0

    def hang(self, busy_since_s: float | None, now_s: float) -> str | None:
        """The hang in words, while there is one; times by time.monotonic."""
        if busy_since_s is None or now_s - busy_since_s <= self.hang_timeout_s:
            return None
        busy_s = now_s - busy_since_s
        return f"policy: no answer for {busy_s:.1f} s, limit {self.hang_timeout_s:g} s"

    def look(self, busy_since_s: float | None, now_s: float) -> str | None:
        """A hang that was not seen before; it is counted."""
        hang = self.hang(busy_since_s, now_s)
        if hang is None or self._known_s == busy_since_s:
            return None
        self._known_s = busy_since_s
        self.hangs += 1
        return hang

    def judge(self, result: InferenceResult) -> Fault | None:
        """Count a result; the fault that it completes."""
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

    def forget(self) -> None:
        """A new activation: earlier failures do not count."""
        self._failures = 0
