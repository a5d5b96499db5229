"""The control thread. Faults pinned: two arms braked one after the other, one arm left moving when
the other's controller is gone, a thread that dies unnoticed, commands after a fault, a burst of
missed ticks, a trajectory that is sent after its time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.trajectory import Braking, CommandStream, TrajectoryPoints
from pi05_ros.executor import ExecutorState
from pi05_ros.nodes.control_thread import ControlThread
from pi05_ros.requests import Fault
from pi05_ros.runner import Tick
from pi05_ros.types import JointGroup, JointSpec, Problem

DT_S = 0.02
Make = Callable[..., ControlThread]
JOINTS = JointGroup([JointSpec(name, -9, 9, 2.0, 10.0) for name in ("a", "b")])


class FakeRunner:
    """Moves both joints at full speed; with an `answer`, a tick returns or raises that."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.executor = SimpleNamespace(state=ExecutorState.READY, has_results=False)
        self.stream = CommandStream(MotionLimiter(JOINTS, DT_S))
        self.stopped = False
        self.log: list[str] = []

    def activate(self) -> None:
        self.log.append("activate")

    def tick(self, now_s: float, request: bool) -> Tick:
        assert not request
        self.log.append("tick")
        if callable(self.answer):
            self.answer()
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, Tick):
            return self.answer
        if self.stopped:
            return Tick()
        if not self.stream.active:
            self.stream.start(np.zeros(2), now_s)
            self.began_s = now_s
        speed = np.array([1.9, 1.9])
        return Tick(self.stream.tick(now_s, lambda times: np.outer(times - self.began_s, speed)))

    def process_results(self, now_s: float) -> Tick:
        self.log.append("results")
        return Tick()

    def published(self, tick: Tick) -> None:
        self.log.append("published" if tick.trajectory is not None else "nothing published")

    def not_published(self) -> None:
        self.log.append("not published")

    def braking_not_published(self, now_s: float) -> Braking | None:
        self.log.append("braking not published")
        return None

    def request_inference(self, now_s: float) -> None:
        self.log.append("request")

    def come_to_rest(self, now_s: float) -> Braking | None:
        if not self.stream.active:
            return None
        return Braking(self.stream.brake(now_s), now_s, self.stream.rest_time_s)

    def stop(self, now_s: float) -> Braking | None:
        self.log.append("stop")
        self.stopped = True
        return self.come_to_rest(now_s)

    def deactivate(self, now_s: float) -> Braking | None:
        self.log.append("deactivate")
        return self.come_to_rest(now_s)


class Spy:
    """An output that keeps what is sent, with the time."""

    topic = "arm/commands"

    def __init__(self, column: int = 0, direct: bool = True) -> None:
        self.direct, self.column = direct, column
        self.subscribed = True
        self.velocities: list[float] = []
        self.positions: list[float] = []
        self.times_s: list[float] = []
        self.trajectories: list[TrajectoryPoints] = []

    subscriber_names = ("/controller",)

    def has_controller(self) -> bool:
        return self.subscribed

    def send_trajectory(self, trajectory: TrajectoryPoints) -> int:
        if not self.direct:
            self.trajectories.append(trajectory)
        return int(not self.direct)

    def send_command(self, stream: CommandStream, now_s: float) -> int:
        if self.direct:
            state = stream.commanded(now_s + stream.dt_s)
            self.times_s.append(time.monotonic())
            self.velocities.append(float(state.velocity[self.column]))
            self.positions.append(float(state.position[self.column]))
        return int(self.direct)

    def send_rest(self) -> int:
        if self.direct:
            self.times_s.append(time.monotonic())
            self.velocities.append(0.0)
            self.positions.append(self.positions[-1] if self.positions else 0.0)
        return int(self.direct)


@pytest.fixture()
def node(ros: None) -> Iterator[Node]:
    node = Node("test_control_thread")
    yield node
    node.destroy_node()


@pytest.fixture()
def make(node: Node) -> Iterator[Make]:
    made = []

    def make(
        runner: FakeRunner, *outputs: Spy, on_fault: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> ControlThread:  # fmt: skip
        control = ControlThread(node, on_fault)
        control.outputs.update({str(i): spy for i, spy in enumerate(outputs)})  # type: ignore[misc]
        options = {"dry_run": False, "realtime_priority": 0, **options}
        control.set_up(runner, ["a", "b"], **options)  # type: ignore[arg-type]
        made.append(control)
        return control

    yield make
    for control in made:
        control.tear_down()


def wait(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def moving(spy: Spy) -> bool:
    return bool(spy.velocities) and spy.velocities[-1] > 1.5


def check_braking(spy: Spy, begin: int, others: int = 0) -> None:
    """Ends at rest, no step beyond the acceleration limit, and no silence in between."""
    velocities = np.array(spy.velocities[begin:])
    assert velocities[-1] == 0.0
    # a sleeping thread may be woken some ms late: several periods of braking in one step
    gaps_s = np.diff(spy.times_s[begin:])
    steps = np.abs(np.diff(velocities))
    assert (steps <= 10.0 * (gaps_s + DT_S) + 1e-6).all()
    assert (np.diff(spy.positions[begin:]) >= -1e-9).all(), "the braking was replayed"


@pytest.mark.parametrize("end", ["stop", "end", "fault"])
def test_all_outputs_brake_together(make: Make, end: str) -> None:
    """Fault: the second arm without a command for the first one's whole braking time, then braked
    from its old velocity once more."""
    runner, arms = FakeRunner(), (Spy(0), Spy(1))
    control = make(runner, *arms)
    control.start()
    wait(lambda: all(moving(arm) for arm in arms))
    begin = len(arms[0].velocities) - 1
    if end == "stop":
        assert control.stop(until_rest_s=5.0)
    elif end == "fault":
        runner.answer = ZeroDivisionError("of nothing")
        wait(lambda: control.fault)
    control.end()
    for arm in arms:
        check_braking(arm, begin)
    assert abs(len(arms[0].velocities) - len(arms[1].velocities)) <= 1
    shared = min(len(arm.times_s) for arm in arms)
    apart_s = np.abs(np.array(arms[0].times_s[:shared]) - np.array(arms[1].times_s[:shared]))
    assert np.median(apart_s) < DT_S / 2


def test_a_lost_controller_brakes_the_others(make: Make) -> None:
    """Fault: the arm that is still there keeps its velocity for ever."""
    runner, lost, other, trajectories = FakeRunner(), Spy(0), Spy(1), Spy(0, direct=False)
    control = make(runner, lost, other, trajectories)
    control.start()
    wait(lambda: moving(other))
    begin = len(other.velocities) - 1
    lost.subscribed = False
    wait(lambda: other.velocities[-1] == 0.0)
    time.sleep(0.1)
    check_braking(other, begin)
    assert not trajectories.trajectories[-1].velocities[-1].any()
    count = len(trajectories.trajectories)
    time.sleep(0.1)
    assert len(trajectories.trajectories) == count, "trajectories without a controller"
    control.end()


def test_a_second_publisher_brakes(make: Make) -> None:
    runner, arm = FakeRunner(), Spy()
    control = make(runner, arm)
    control.start()
    wait(lambda: moving(arm))
    control.conflicts = [Problem("publishers", "publishers: 2 on /joint_states")]
    wait(lambda: arm.velocities[-1] == 0.0)
    runner.log.clear()
    time.sleep(0.1)
    assert "tick" not in runner.log
    control.conflicts = []
    wait(lambda: "tick" in runner.log)
    control.end()


def test_a_stop_is_answered_when_the_braking_has_begun(make: Make) -> None:
    """And every stop is answered, also during the braking of another one."""
    runner, arm = FakeRunner(), Spy()
    control = make(runner, arm)
    control.start()
    wait(lambda: moving(arm))
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(control.stop())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4 and runner.stopped
    control.end()
    assert control.stop(), "a stop without a thread only latches"
    assert runner.log.count("stop") == 5


@pytest.mark.parametrize(
    ("answer", "message", "device"),
    [
        (ZeroDivisionError("of nothing"), "the control thread failed: of nothing", False),
        (Tick(fault=Fault("out of memory", device=True)), "out of memory", True),
    ],
)
def test_a_fault_ends_the_commands_and_reaches_the_node(
    node: Node, make: Make, answer: Any, message: str, device: bool
) -> None:
    """The lifecycle transition happens on the node's executor."""
    handed: list[Fault | None] = []
    runner = FakeRunner(answer)
    control: ControlThread
    control = make(runner, on_fault=lambda: handed.append(control.fault))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    control.start()
    deadline_s = time.monotonic() + 10.0
    while not handed and time.monotonic() < deadline_s:
        executor.spin_once(timeout_sec=0.1)
    assert handed == [Fault(message, device=device)]
    time.sleep(0.06)
    assert runner.log == ["activate", "tick", "deactivate"], "commands after the fault"
    control.end()
    executor.shutdown()


def test_a_runner_that_cannot_brake_leaves_no_velocity(make: Make) -> None:
    """Fault: an error in the braking itself, and the last velocity for ever."""
    runner, arm = FakeRunner(), Spy()
    control = make(runner, arm)
    control.start()
    wait(lambda: moving(arm))

    def fail(now_s: float) -> Braking | None:
        raise ZeroDivisionError

    runner.deactivate = fail  # type: ignore[method-assign]
    control.end()
    assert arm.velocities[-1] == 0.0


def test_the_end_of_the_process_is_no_fault(make: Make) -> None:
    """Fault: a traceback when the middleware is shut down and a tick is due."""
    runner = FakeRunner(RuntimeError("publisher's context is invalid"))
    control = make(runner)
    rclpy.shutdown()
    control._advance(in_between=False)
    assert control.fault is None and runner.log == ["tick"]


def test_commands_go_out_before_the_next_inference_is_requested(make: Make) -> None:
    """Its first steps would hold the interpreter while the arms wait for their message."""
    runner, arm = FakeRunner(), Spy(direct=False)
    control = make(runner, arm)
    control.start()
    wait(lambda: "request" in runner.log)
    control.end()
    assert runner.log[:4] == ["activate", "tick", "published", "request"]
    assert control.trajectories >= 1 and arm.trajectories


def test_between_ticks_direct_outputs_get_no_command(make: Make) -> None:
    """They get one command per tick; and a frame matters only to a free executor."""
    runner, arm = FakeRunner(), Spy()
    control = make(runner, arm)
    control._advance(in_between=True)
    assert runner.log == ["results", "nothing published", "request"] and not arm.velocities
    control.frame_arrived()
    assert control._news
    control._news = False
    runner.executor.state = ExecutorState.BUSY
    control.frame_arrived()
    assert not control._news


def test_a_late_trajectory_is_not_sent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a message that leaves 57–210 ms after its stamp, a step for the controller."""
    runner, arm = FakeRunner(), Spy(direct=False)
    control = make(runner, arm)
    monkeypatch.setattr(CommandStream, "in_time", lambda self, now_s: False)
    control._advance(in_between=False)
    assert not arm.trajectories and control.late == 1 and control.trajectories == 0
    assert runner.log == ["tick", "not published", "nothing published", "request"]
    control._order(SimpleNamespace(  # type: ignore[arg-type]
        end=lambda runner, now_s: runner.deactivate(now_s), last=False,
        begun=threading.Event(), rested=threading.Event(),
    ))  # fmt: skip
    assert not arm.trajectories and control.late == 2
    assert runner.log[-2:] == ["deactivate", "braking not published"]


def test_a_dry_run_sends_nothing(make: Make) -> None:
    runner, arm, trajectories = FakeRunner(), Spy(), Spy(direct=False)
    control = make(runner, arm, trajectories, dry_run=True)
    control.start()
    wait(lambda: runner.log.count("request") > 3)
    control.stop(until_rest_s=1.0)
    control.end()
    assert not arm.velocities and not trajectories.trajectories


def test_missed_ticks_are_skipped(make: Make) -> None:
    """A burst would infer and publish many times at once."""
    times_s: list[float] = []

    def note() -> None:
        times_s.append(time.monotonic())
        if len(times_s) == 2:
            time.sleep(0.3)

    runner = FakeRunner(note)
    control = make(runner)
    control.start()
    wait(lambda: len(times_s) > 12)
    control.end()
    # a burst would make up for the 15 ticks that the stall of 0.3 s covers
    assert len(times_s) <= (times_s[-1] - times_s[0] - 0.3) / DT_S + 3


def test_end_waits_for_the_tick_under_way(make: Make) -> None:
    """Fault: a transition that takes the outputs away from under a tick; and it starts again."""
    ended = threading.Event()

    def slow() -> None:
        time.sleep(0.1)
        ended.set()

    runner = FakeRunner(slow)
    control = make(runner)
    for _ in range(3):
        ended.clear()
        control.start()
        wait(lambda: "tick" in runner.log)
        runner.log.clear()
        control.end()
        assert ended.is_set()


def test_a_priority_that_is_not_granted_is_logged(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    logged: list[str] = []
    monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
    runner = FakeRunner()
    control = make(runner, realtime_priority=50)
    logger = SimpleNamespace(info=lambda text, **_: logged.append(text))
    monkeypatch.setattr(control, "_node", SimpleNamespace(get_logger=lambda: logger))
    control._request_priority()
    assert len(logged) == 1 and "Operation not permitted" in logged[0]
