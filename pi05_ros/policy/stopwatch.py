"""How long each stage of an inference takes, on the CPU and on a GPU that works behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Mark = Callable[[str], None]
"""Told a stage's name when it is done."""


def unmarked(stage: str) -> None:
    """Nobody wants to know."""


class StageClock:
    """Times consecutive stages; one object per inference.

    On a GPU, the host only gives orders: what is asked of the device is timed by events between
    the orders, what the host does itself by its own clock. Both run beside each other, so the sum
    of all stages can be more than the whole.
    """

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        """Start now.

        Args:
            device: where the stages of `mark` run.
            make_event: a CUDA event that takes its time; by default on CUDA alone.
        """
        if make_event is None and device.type == "cuda":
            make_event = _cuda_event
        self._make_event = make_event
        self._host_s = time.perf_counter()
        self._events: list[tuple[str, Any]] = []
        self._timings_s: dict[str, float] = {}
        self._order: list[str] = []
        self._record("")

    def mark(self, stage: str) -> None:
        """The device's stage ends here; it began with the mark before."""
        self._order.append(stage)
        if self._make_event is None:
            self._add_host(stage)
        else:
            self._record(stage)

    def mark_host(self, stage: str) -> None:
        """The host's own stage ends here."""
        self._order.append(stage)
        self._add_host(stage)

    def skip_host(self) -> None:
        """What the host did since the last mark belongs to no stage of its own."""
        self._host_s = time.perf_counter()

    def timings_s(self) -> dict[str, float]:
        """Seconds per stage, in order. Waits until the device has finished the last one."""
        timings_s = dict(self._timings_s)
        if self._events:
            self._events[-1][1].synchronize()
        for (_, before), (stage, event) in zip(self._events, self._events[1:], strict=False):
            timings_s[stage] = before.elapsed_time(event) * 1e-3
        return {stage: timings_s[stage] for stage in dict.fromkeys(self._order)}

    def _add_host(self, stage: str) -> None:
        now_s = time.perf_counter()
        self._timings_s[stage] = self._timings_s.get(stage, 0.0) + now_s - self._host_s
        self._host_s = now_s

    def _record(self, stage: str) -> None:
        if self._make_event is not None:
            event = self._make_event()
            event.record()
            self._events.append((stage, event))


def _cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)
