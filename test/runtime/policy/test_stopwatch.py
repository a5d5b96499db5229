"""Stage times; fault: the host's orders taken for the device's work."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from pi05_ros.policy import inference as stopwatch
from pi05_ros.policy.inference import StageClock
from pi05_ros.policy.model import unmarked

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the host's clock shows; a test appends to it."""
    shown = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: shown[-1])
    return shown


class Event:
    """Takes its time from a device that is far behind the host."""

    times_ms: Iterator[float]
    waited_for: Event | None = None
    """What the host has waited for; the device has done all before it, and nothing after."""

    def record(self) -> None:
        self.time_ms = next(Event.times_ms)

    def synchronize(self) -> None:
        Event.waited_for = self

    def elapsed_time(self, later: Event) -> float:
        if Event.waited_for is None or later.time_ms > Event.waited_for.time_ms:
            raise RuntimeError("device not ready")
        return later.time_ms - self.time_ms


def test_on_a_cpu_all_stages_follow_each_other(seconds: list[float]) -> None:
    clock = StageClock(CPU)
    for stage, end_s in (("vision", 100.5), ("prompt", 100.75), ("vision", 101.0)):
        seconds.append(end_s)
        (clock.mark_host if stage == "prompt" else clock.mark)(stage)
    seconds.append(107.0)
    clock.skip_host()
    seconds.append(107.5)
    clock.mark_host("postprocess")
    timings_s = clock.timings_s()
    assert timings_s == {"vision": 0.75, "prompt": 0.25, "postprocess": 0.5}
    assert list(timings_s) == ["vision", "prompt", "postprocess"]


def test_on_a_gpu_its_stages_are_timed_by_its_events(seconds: list[float]) -> None:
    """Pins: an event that is asked for its time while the device is on its way to it."""
    Event.times_ms = iter([10.0, 14.0, 15.5])
    clock = StageClock(torch.device("cuda"), Event)
    seconds.append(100.001)
    clock.mark("vision")
    clock.mark_host("prompt")
    clock.mark("prefix")
    assert clock.timings_s() == pytest.approx({"vision": 4e-3, "prompt": 1e-3, "prefix": 1.5e-3})


def test_a_real_clock() -> None:
    clock = StageClock(CPU)
    time.sleep(2e-3)
    clock.mark("sleep")
    unmarked("sleep")
    assert 2e-3 <= clock.timings_s()["sleep"] < 1.0
