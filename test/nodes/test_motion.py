"""The control thread's wiring; faults: a thread that dies unnoticed, commands after a fault."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from pi05_ros.executor import ExecutorState, Fault
from pi05_ros.nodes.motion import Motion
from pi05_ros.runner import Tick


class FakeRunner:
    """Returns or raises what it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.stream = SimpleNamespace(dt_s=0.02)
        self.executor = SimpleNamespace(state=ExecutorState.READY, has_results=False)
        self.stopped = False
        self.log: list[str] = []

    def activate(self) -> None:
        self.log.append("activate")

    def tick(self, now_s: float, ask: bool) -> Tick:
        assert not ask
        self.log.append("tick")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def attend(self, now_s: float) -> Tick:
        self.log.append("attend")
        return Tick()

    def published(self, tick: Tick) -> None:
        self.log.append("published")

    def ask(self, now_s: float) -> None:
        self.log.append("ask")

    def deactivate(self, now_s: float) -> None:
        self.log.append("deactivate")


class Spy:
    """An output that notes what is sent."""

    deaf, topic = False, "arm/joint_trajectory"

    def __init__(self, log: list[str], in_between: bool) -> None:
        self.in_between = in_between
        self._log = log

    def send(self, *_: Any) -> int:
        self._log.append(f"send, in_between={self.in_between}")
        return 1


@pytest.fixture()
def node(ros: None) -> Iterator[Node]:
    node = Node("test_motion")
    yield node
    node.destroy_node()


def moving(node: Node, answer: Any, on_fault: Any = lambda: None) -> tuple[Motion, FakeRunner]:
    runner, motion = FakeRunner(answer), Motion(node, on_fault)
    motion.set_up(runner, ["a"], dry_run=False, realtime_priority=0)  # type: ignore[arg-type]
    return motion, runner


def wait(condition: Any) -> None:
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("answer", "message", "device"),
    [
        (ZeroDivisionError("of nothing"), "the control thread failed: of nothing", False),
        (Tick(fault=Fault("out of memory", device=True)), "out of memory", True),
    ],
)
def test_a_fault_ends_the_commands_and_is_handed_over(
    node: Node, answer: Any, message: str, device: bool
) -> None:
    """The transition happens on the node's thread: rclpy's state machine is nobody else's."""
    handed: list[Fault | None] = []
    motion: Motion
    motion, runner = moving(node, answer, lambda: handed.append(motion.fault))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    motion.start()
    deadline_s = time.monotonic() + 10.0
    while not handed and time.monotonic() < deadline_s:
        executor.spin_once(timeout_sec=0.1)
    assert handed == [Fault(message, device=device)]
    time.sleep(0.06)
    assert runner.log == ["activate", "tick"], "it went on after the fault"
    motion.end()
    assert runner.log[-1] == "deactivate"
    motion.tear_down()
    executor.shutdown()


def test_the_end_of_the_process_is_no_fault(node: Node) -> None:
    """Fault: a traceback at Ctrl-C, when the middleware is gone and a tick is due."""
    motion, runner = moving(node, RuntimeError("publisher's context is invalid"))
    rclpy.shutdown()
    motion._tick()
    assert motion.fault is None and runner.log == ["tick"]


def test_commands_go_out_before_the_next_inference_is_asked_for(node: Node) -> None:
    """Its first steps would hold the interpreter while the arms wait for their message."""
    motion, runner = moving(node, Tick())
    motion.outputs["arm"] = Spy(runner.log, True)  # type: ignore[assignment]
    motion.start()
    wait(lambda: "ask" in runner.log)
    motion.end()
    motion.tear_down()
    assert runner.log[:5] == ["activate", "tick", "send, in_between=True", "published", "ask"]
    assert motion.trajectories >= 1


def test_between_ticks_direct_outputs_are_left_alone(node: Node) -> None:
    """They are promised one command per tick; and a frame is looked at only by a free executor."""
    motion, runner = moving(node, Tick())
    motion.outputs["arm"] = Spy(runner.log, False)  # type: ignore[assignment]
    motion._attend()
    assert runner.log == ["attend", "published", "ask"]
    notified: list[int] = []
    motion._loop.notify = lambda: notified.append(1)  # type: ignore[union-attr, method-assign]
    motion.frame_arrived()
    runner.executor.state = ExecutorState.BUSY
    motion.frame_arrived()
    assert notified == [1]
    motion.tear_down()
    motion.something_arrived()
    assert rclpy.ok()
