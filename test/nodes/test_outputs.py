"""Faults pinned: columns given to the wrong controller, a velocity that is never taken back, a
direct controller that is left in mid-motion, a missing message package without a name."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from rclpy.node import Node

from pi05_ros.config import ControllerParameters, ParameterError
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.trajectory import CommandStream
from pi05_ros.nodes.outputs import DirectOutput, Output, make_output
from pi05_ros.sim.trajectory_rules import Trajectory, check_trajectory
from pi05_ros.types import JointGroup, JointSpec

DT_S = 0.02
JOINTS = JointGroup([JointSpec(name, -3, 3, 2.0, 10.0) for name in ("a", "b", "c")])


@pytest.fixture()
def node(ros: None) -> Iterator[Node]:
    node = Node("test_outputs")
    yield node
    node.destroy_node()


def output(node: Node, kind: str, sent: list[object]) -> Output:
    """Of a controller that commands c and a, in this order; what it publishes is kept."""
    made = make_output(node, "arm", ControllerParameters(output=kind), ["c", "a"], [2, 0])
    publisher = made._publisher

    class Spy:
        publish = staticmethod(sent.append)
        get_subscription_count = publisher.get_subscription_count

    made._publisher = Spy()  # type: ignore[assignment]
    return made


@pytest.fixture()
def stream() -> CommandStream:
    """In motion: a to the right, c to the left."""
    stream = CommandStream(JOINTS, MotionLimiter(JOINTS, DT_S), DT_S)
    stream.start(np.zeros(3), 10.0)
    for tick in range(20):
        stream.tick(10.0 + tick * DT_S, lambda t: np.outer(t - 10.0, [1.0, 0.0, -1.0]))
    return stream


NOW_S = 10.0 + 20 * DT_S


def test_trajectories_keep_the_controllers_rules(node: Node, stream: CommandStream) -> None:
    sent: list = []
    made = output(node, "joint_trajectory", sent)
    assert made.topic == "arm/joint_trajectory" and made.deaf
    points = stream.tick(NOW_S, lambda t: np.outer(t - 10.0, [1.0, 0.0, -1.0]))
    assert made.send(points, stream, NOW_S) == 1 and made.send(None, stream, NOW_S) == 0
    (message,) = sent
    assert message.joint_names == ["c", "a"]
    times_s = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]
    trajectory = Trajectory(
        message.joint_names,
        points.stamp_s,
        times_s,
        [list(point.positions) for point in message.points],
        [list(point.velocities) for point in message.points],
    )
    assert check_trajectory(trajectory, ["c", "a"], NOW_S) is None
    assert message.points[0].positions[0] < 0 < message.points[0].positions[1]


@pytest.mark.parametrize("kind", ["forward_position", "forward_velocity"])
def test_direct_commands_follow_the_stream(node: Node, stream: CommandStream, kind: str) -> None:
    sent: list = []
    made = output(node, kind, sent)
    assert made.topic == "arm/commands"
    assert made.send(None, stream, NOW_S) == 1
    state = stream.commanded(NOW_S + DT_S)
    expected = state.position if kind == "forward_position" else state.velocity
    np.testing.assert_allclose(sent[0].data, expected[[2, 0]])
    assert sent[0].data[0] < -0.1 and sent[0].data[1] > 0.1


@pytest.mark.parametrize("kind", ["forward_position", "forward_velocity"])
def test_direct_controllers_are_braked_to_rest(
    node: Node, stream: CommandStream, kind: str
) -> None:
    """They hold their last command for ever, so the last one must be rest."""
    sent: list = []
    made = output(node, kind, sent)
    hold = stream.hold(NOW_S)
    began_s = time.monotonic()
    assert made.brake(hold, stream, NOW_S) == len(sent) >= 2
    assert time.monotonic() - began_s < 1.0
    last = np.array(sent[-1].data)
    if kind == "forward_velocity":
        np.testing.assert_array_equal(last, 0.0)
    else:
        np.testing.assert_allclose(last, hold.positions[-1, [2, 0]])
    sent.clear()
    made.send(None, stream, NOW_S + 1.0)
    assert [list(message.data) for message in sent] == (
        [[0.0, 0.0]] if kind == "forward_velocity" else []
    )


def test_a_topic_may_be_given(node: Node) -> None:
    parameters = ControllerParameters(output="forward_position", topic="xs/commands")
    assert make_output(node, "arm", parameters, ["a"], [0]).topic == "xs/commands"


def test_interbotix_without_its_messages_is_named(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs", None)
    with pytest.raises(ParameterError, match="interbotix_xs_msgs"):
        make_output(node, "arm", ControllerParameters(output="interbotix"), ["a"], [0])


def test_interbotix_gets_its_group_command(node: Node, stream: CommandStream) -> None:
    """The package is not on PyPI; a message with its fields stands in for it."""

    @dataclass
    class JointGroupCommand:
        name: str = ""
        cmd: list[float] = field(default_factory=list)

    sent: list = []
    made = DirectOutput(node, "arm/commands/joint_group", [2, 0], group="arm")
    made._message_type = JointGroupCommand
    made._publisher = SimpleNamespace(publish=sent.append)
    made.send(None, stream, NOW_S)
    assert sent[0].name == "arm"
    np.testing.assert_allclose(sent[0].cmd, stream.commanded(NOW_S + DT_S).position[[2, 0]])
