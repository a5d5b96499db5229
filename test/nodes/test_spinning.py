"""A node's process; faults: a traceback at Ctrl-C, an error of a callback that goes unseen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rclpy
from rclpy.node import Node
from std_msgs.msg import String

from pi05_ros.config import ParameterError
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


def test_bad_parameters_are_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Ticking:
        raise ParameterError("control_rate_hz must be above 0")

    assert spin_until_interrupted(refuse, "ticking", []) == 2
    assert capsys.readouterr().err == "ticking: control_rate_hz must be above 0\n"
