"""A node's process. Faults pinned: a signal that shuts the middleware down before the arms brake, a
traceback at Ctrl-C, an error of a callback that goes unseen, services that wait for a load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import rclpy
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.waitable import NumberOfEntities, Waitable
from std_msgs.msg import String
from std_srvs.srv import Trigger

from pi05_ros.config import ParameterError
from pi05_ros.nodes import spinning
from pi05_ros.nodes.spinning import spin_until_interrupted


class Ticking(Node):
    """Calls `act` in a timer, as soon as it is spun."""

    def __init__(self, act: Callable[[Ticking], None]) -> None:
        super().__init__("ticking")
        self.publisher = self.create_publisher(String, "words", 1)
        self.closed = 0
        self.create_timer(0.0, lambda: act(self))

    def close(self) -> None:
        self.closed += 1


def test_a_callback_that_outlives_the_middleware_is_no_error() -> None:
    def interrupted(node: Ticking) -> None:
        rclpy.shutdown()
        node.publisher.publish(String(data="too late"))

    assert spin_until_interrupted(lambda: Ticking(interrupted), "ticking", []) == 0


def test_other_errors_end_the_process_and_close_the_node() -> None:
    made: list[Ticking] = []

    def make(error: Exception) -> Ticking:
        def fail(_: Ticking) -> None:
            raise error

        made.append(Ticking(fail))
        return made[-1]

    for error in (RuntimeError("of theirs"), ValueError("of ours")):
        with pytest.raises(type(error), match="of"):
            spin_until_interrupted(lambda error=error: make(error), "ticking", [])  # type: ignore[misc]
    assert [node.closed for node in made] == [1, 1]


def test_bad_parameters_give_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse() -> Ticking:
        raise ParameterError("control_rate_hz must be above 0")

    assert spin_until_interrupted(refuse, "ticking", []) == 2
    assert capsys.readouterr().err == "ticking: control_rate_hz must be above 0\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_brakes_before_anything_is_shut_down(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the main thread is inside a callback that does not return for a while."""
    seen: list[Any] = []
    monkeypatch.setattr(spinning, "GRACE_S", 60.0)

    class Arm(Ticking):
        def brake(self) -> None:
            seen.append(("braked", rclpy.ok(), threading.current_thread().name))

    def work(node: Ticking) -> None:
        if not seen:
            os.kill(os.getpid(), number)
            deadline_s = time.monotonic() + 10.0
            while not seen and time.monotonic() < deadline_s:
                time.sleep(0.01)
            seen.append("callback")

    before = signal.getsignal(number)
    assert spin_until_interrupted(lambda: Arm(work), "ticking", []) == 0
    assert seen == [("braked", True, "signals"), "callback"]
    assert signal.getsignal(number) is before and not rclpy.ok()


def test_a_transition_runs_beside_the_services() -> None:
    """Fault: stop is served after the load, when autostart has activated already."""
    answers: list[str] = []

    class Loading(Ticking):
        exit_code: int | None = None

        def __init__(self) -> None:
            super().__init__(lambda node: None)
            self.served = threading.Event()
            self.load = self.create_timer(0.0, self.on_load, ReentrantCallbackGroup())
            self.create_service(Trigger, "ticking_stop", self.on_stop)
            self.client = self.create_client(Trigger, "ticking_stop")

        def is_transition(self, entity: Any) -> bool:
            return entity is self.load

        def on_load(self) -> None:
            self.load.cancel()
            while not self.client.service_is_ready():
                time.sleep(0.01)
            self.client.call_async(Trigger.Request())
            answers.append("in time" if self.served.wait(10.0) else "too late")
            self.exit_code = 3

        def on_stop(self, _: Any, response: Any) -> Any:
            self.served.set()
            return response

    assert spin_until_interrupted(Loading, "ticking", []) == 3
    assert answers == ["in time"]


def test_an_entity_that_a_transition_destroys_ends_nothing() -> None:
    """Fault: a publisher with events is destroyed while rclpy collects them, and the node ends."""
    refused: list[int] = []

    class Destroyed(Waitable):
        """As rclpy's event handler, whose handle another thread has destroyed."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: Any) -> None:
            pass

        def get_num_entities(self) -> NumberOfEntities:
            return NumberOfEntities()

        def add_to_wait_set(self, wait_set: Any) -> None:
            refused.append(1)
            if len(refused) < 4:
                raise InvalidHandle("destruction was requested")

        def is_ready(self, wait_set: Any) -> bool:
            return len(refused) == 4

        def take_data(self) -> None:
            refused.append(2)
            raise InvalidHandle("destruction was requested")

    class Loading(Ticking):
        exit_code: int | None = None

    def end(node: Any) -> None:
        node.exit_code = 5

    def make() -> Ticking:
        node = Loading(end)
        node.add_waitable(Destroyed(node.default_callback_group))
        return node

    assert spin_until_interrupted(make, "ticking", []) == 5
    assert refused[:5] == [1, 1, 1, 1, 2]


def test_an_error_in_a_transition_ends_the_process() -> None:
    class Failing(Ticking):
        def is_transition(self, entity: Any) -> bool:
            return True

    def fail(_: Ticking) -> None:
        raise ZeroDivisionError("in a transition")

    with pytest.raises(ZeroDivisionError, match="in a transition"):
        spin_until_interrupted(lambda: Failing(fail), "ticking", [])


@pytest.mark.parametrize("hangs", ["callback", "inference"])
def test_a_process_that_hangs_ends_by_its_signal(hangs: str) -> None:
    """Fault: exit code -6, "terminate called without an active exception"; or no end at all."""
    program = """
        import sys, threading, time
        from rclpy.node import Node
        from pi05_ros.nodes import spinning

        class Hanging(Node):
            def __init__(self):
                super().__init__("hanging")
                if sys.argv[1] == "inference":
                    inference = threading.Thread(target=time.sleep, args=(60,), daemon=True)
                    inference.name = "pi05_executor"
                    inference.start()
                self.create_timer(0.0, self.run)
            def run(self):
                print("spinning", flush=True)
                if sys.argv[1] == "callback":
                    time.sleep(60)
            def brake(self):
                print("braked", flush=True)
            def close(self):
                pass

        spinning.GRACE_S = 0.3
        sys.exit(spinning.leave_if_busy(spinning.spin_until_interrupted(Hanging, "hanging", [])))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), hangs], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "spinning\n"
    process.send_signal(signal.SIGTERM)
    code = process.wait(20.0)
    assert "braked\n" in process.stdout.read()
    assert code == (0 if hangs == "inference" else 128 + signal.SIGTERM)
    process.stdout.close()
