"""The control thread; faults: a tick that waits for others, a burst, a call after stop."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pi05_ros.nodes import control_loop
from pi05_ros.nodes.control_loop import ControlLoop

LONG_S = 60.0


class FakeNode:
    def __init__(self, sim_time: bool = False) -> None:
        self.sim_time = sim_time
        self.timers: list[str] = []
        self.logged: list[str] = []

    def get_parameter(self, name: str) -> Any:
        assert name == "use_sim_time"
        return SimpleNamespace(value=self.sim_time)

    def create_timer(self, period_s: float, callback: Any) -> Any:
        log = self.timers
        return SimpleNamespace(
            reset=lambda: log.append("reset"), cancel=lambda: log.append("cancel")
        )

    def destroy_timer(self, timer: Any) -> None:
        self.timers.append("destroy")

    def get_logger(self) -> Any:
        return SimpleNamespace(info=lambda text, **_: self.logged.append(text))


class Calls:
    """Counts, and can be waited for."""

    def __init__(self) -> None:
        self.count = 0
        self.times_s: list[float] = []
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.count += 1
            self.times_s.append(time.monotonic())
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, 10.0), self.count


def make(period_s: float, tick: Any, attend: Any, **options: Any) -> ControlLoop:
    return ControlLoop(FakeNode(), period_s, tick, attend, **options)  # type: ignore[arg-type]


def test_ticks_begin_at_once_and_go_on() -> None:
    tick, attend = Calls(), Calls()
    loop = make(0.01, tick, attend)
    assert tick.count == 0
    loop.start()
    tick.wait(5)
    loop.stop()
    count = tick.count
    time.sleep(0.05)
    assert tick.count == count and attend.count == 0


def test_what_comes_is_attended_to_before_the_next_tick() -> None:
    tick, attend = Calls(), Calls()
    loop = make(LONG_S, tick, attend)
    loop.start()
    tick.wait(1)
    loop.notify()
    attend.wait(1)
    loop.notify()
    attend.wait(2)
    loop.stop()
    assert tick.count == 1


def test_a_tick_that_is_about_to_come_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_loop, "ATTEND_LEFT_S", LONG_S)
    tick, attend = Calls(), Calls()
    loop = make(0.05, tick, attend)
    loop.start()
    tick.wait(1)
    loop.notify()
    tick.wait(3)
    loop.stop()
    assert attend.count == 0


def test_missed_ticks_are_not_made_up_for() -> None:
    """A burst would infer and publish many times for one moment."""
    tick = Calls()

    def slow_once() -> None:
        tick()
        if tick.count == 1:
            time.sleep(0.7)

    loop = make(0.2, slow_once, Calls())
    loop.start()
    tick.wait(4)
    loop.stop()
    gaps_s = [
        after - before for before, after in zip(tick.times_s[1:], tick.times_s[2:], strict=False)
    ]
    assert min(gaps_s) > 0.02


@pytest.mark.parametrize("by", ["tick", "attend"])
def test_a_call_may_stop_the_loop(by: str) -> None:
    """Fault: a thread that waits for its own end."""
    loop: ControlLoop
    calls = Calls()

    def stop() -> None:
        loop.stop()
        calls()

    if by == "tick":
        loop = make(0.01, stop, Calls())
        loop.start()
    else:
        other = Calls()
        loop = make(LONG_S, other, stop)
        loop.start()
        other.wait(1)
        loop.notify()
    calls.wait(1)
    time.sleep(0.05)
    assert calls.count == 1
    loop.stop()


def test_it_starts_again() -> None:
    tick = Calls()
    loop = make(LONG_S, tick, Calls())
    for count in (1, 2, 3):
        loop.start()
        tick.wait(count)
    loop.destroy()


def test_stop_waits_for_the_call_under_way() -> None:
    """Fault: a transition that takes the outputs away from under a tick."""
    begun, ended = threading.Event(), threading.Event()

    def tick() -> None:
        begun.set()
        time.sleep(0.1)
        ended.set()

    loop = make(LONG_S, tick, Calls())
    loop.start()
    assert begun.wait(10.0)
    loop.stop()
    assert ended.is_set()


def test_a_clock_that_can_stand_drives_a_timer() -> None:
    node, tick = FakeNode(sim_time=True), Calls()
    loop = ControlLoop(node, 0.01, tick, Calls())  # type: ignore[arg-type]
    loop.start()
    loop.notify()
    loop.destroy()
    assert node.timers == ["cancel", "cancel", "reset", "cancel", "destroy"]
    assert tick.count == 0


def test_a_priority_that_is_not_granted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(control_loop.os, "sched_setscheduler", refuse, raising=False)
    node, tick = FakeNode(), Calls()
    loop = ControlLoop(node, 0.01, tick, Calls(), realtime_priority=50)  # type: ignore[arg-type]
    loop.start()
    tick.wait(2)
    loop.stop()
    assert len(node.logged) == 1 and "Operation not permitted" in node.logged[0]
