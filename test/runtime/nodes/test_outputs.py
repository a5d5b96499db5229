"""Faults pinned: columns given to the wrong controller, a velocity that is never taken back, a bag
recorder taken for a controller, a missing message package without a name."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from pi05_lab.sim.controller import Trajectory, check_trajectory
from pi05_ros.config import ControllerParameters, ParameterError
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.trajectory import CommandStream
from pi05_ros.nodes.graph_checks import ControllerCheck, second_publishers
from pi05_ros.nodes.outputs import Output
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
    made = Output(node, "arm", ControllerParameters(output=kind), ["c", "a"], [2, 0])
    publisher = made._publisher

    class Spy:
        publish = staticmethod(sent.append)
        get_subscription_count = publisher.get_subscription_count

    made._publisher = Spy()  # type: ignore[assignment]
    return made


@pytest.fixture()
def stream() -> CommandStream:
    """In motion: a to the right, c to the left."""
    stream = CommandStream(MotionLimiter(JOINTS, DT_S))
    stream.start(np.zeros(3), 10.0)
    for tick in range(20):
        stream.tick(10.0 + tick * DT_S, lambda t: np.outer(t - 10.0, [1.0, 0.0, -1.0]))
    return stream


NOW_S = 10.0 + 20 * DT_S


def test_trajectories_keep_the_controllers_rules(node: Node, stream: CommandStream) -> None:
    sent: list = []
    made = output(node, "joint_trajectory", sent)
    assert made.topic == "arm/joint_trajectory" and not made.has_controller()
    points = stream.tick(NOW_S, lambda t: np.outer(t - 10.0, [1.0, 0.0, -1.0]))
    assert made.send_trajectory(points) == 1
    assert made.send_command(stream, NOW_S) == made.send_rest() == 0
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
    check_trajectory(trajectory, ["c", "a"], NOW_S)
    assert message.points[0].positions[0] < 0 < message.points[0].positions[1]


@pytest.mark.parametrize("kind", ["forward_position", "forward_velocity"])
def test_direct_commands_follow_the_stream(node: Node, stream: CommandStream, kind: str) -> None:
    sent: list = []
    made = output(node, kind, sent)
    assert made.topic == "arm/commands"
    assert made.send_command(stream, NOW_S) == 1
    state = stream.commanded(NOW_S + DT_S)
    expected = state.position if kind == "forward_position" else state.velocity
    np.testing.assert_allclose(sent[0].data, expected[[2, 0]])
    assert sent[0].data[0] < -0.1 and sent[0].data[1] > 0.1


@pytest.mark.parametrize("kind", ["forward_position", "forward_velocity"])
def test_direct_controllers_end_at_rest(node: Node, stream: CommandStream, kind: str) -> None:
    """They hold their last command for ever, so the last one must be rest."""
    sent: list = []
    made = output(node, kind, sent)
    hold = stream.brake(NOW_S)
    assert made.send_trajectory(hold) == 0
    made.send_command(stream, stream.rest_time_s)
    if kind == "forward_velocity":
        np.testing.assert_array_equal(sent[-1].data, 0.0)
    else:
        np.testing.assert_allclose(sent[-1].data, hold.positions[-1, [2, 0]])
    sent.clear()
    made.send_rest()
    assert [list(message.data) for message in sent] == (
        [[0.0, 0.0]] if kind == "forward_velocity" else []
    )


def wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["rosbag2_recorder", "_ros2cli_4711", "rqt_gui_py_node_1"])
def test_a_recorder_is_no_controller(node: Node, name: str) -> None:
    """Fault: a bag recorder subscribes, so commands continue after the controller has died."""
    made = Output(node, "arm", ControllerParameters(), ["a"], [0])
    recorder, controller = Node(name), Node("arm")
    subscribe = functools.partial(
        Node.create_subscription, msg_type=JointTrajectory, topic="arm/joint_trajectory",
        callback=lambda _: None, qos_profile=1,
    )  # fmt: skip
    subscribe(recorder)
    wait(lambda: made._publisher.get_subscription_count() == 1)
    for _ in range(20):
        assert not made.has_controller()
        time.sleep(0.02)
    assert made.subscriber_names == (f"/{name}",)
    subscription = subscribe(controller)
    wait(made.has_controller)
    controller.destroy_subscription(subscription)
    wait(lambda: not made.has_controller())
    assert made._publisher.get_subscription_count() == 1
    recorder.destroy_node()
    controller.destroy_node()


def test_the_node_that_must_subscribe_may_be_named(node: Node) -> None:
    made = Output(node, "arm", ControllerParameters(node="the_arm"), ["a"], [0])
    made._subscribers, made._names_until_s = 1, float("inf")
    made._publisher = SimpleNamespace(get_subscription_count=lambda: 1)  # type: ignore[assignment]
    for names, expected in [
        (("/other",), False),
        (("/other", "/left/the_arm"), True),
        (("/the_arm",), True),
    ]:
        made.subscriber_names = names
        assert made.has_controller() is expected


@pytest.mark.parametrize("setting", [True, False, None])
def test_a_controller_that_replaces_by_age_moves_nothing(node: Node, setting: bool | None) -> None:
    """Fault: 19 times the velocity limit by the default of ros2_controllers 6.8, without a word."""
    made = Output(node, "arm", ControllerParameters(), ["a"], [0])
    controller = Node("arm", start_parameter_services=setting is not None)
    if setting is not None:
        controller.declare_parameter("allow_trajectory_replacement", setting)
    controller.create_subscription(JointTrajectory, "arm/joint_trajectory", lambda _: None, 1)
    check, executor = ControllerCheck(node), SingleThreadedExecutor()
    for each in (node, controller):
        executor.add_node(each)
    wait(made.has_controller)

    def problems() -> list[str]:
        return [problem.text for problem in check.problems(made.controllers)]

    assert problems() == ["controllers: the settings of /arm are not read yet"]
    deadline_s = time.monotonic() + 10.0
    while any("not read" in line for line in problems()):
        assert time.monotonic() < deadline_s
        executor.spin_once(timeout_sec=0.05)
    lines = problems()
    if setting:
        assert len(lines) == 1 and "/arm has allow_trajectory_replacement: true" in lines[0]
    else:
        assert lines == []
    check.clear()
    executor.shutdown()
    controller.destroy_node()


def test_a_second_publisher_is_named(node: Node) -> None:
    """Faults: two policies on one controller, two drivers on the joint states, without a word."""
    made = Output(node, "arm", ControllerParameters(), ["a"], [0])
    other = Node("other_policy")

    def conflicts() -> list[str]:
        found = second_publishers(node, [made.topic, "joint_states"])
        return [problem.text for problem in found]

    assert conflicts() == []
    own = other.create_publisher(JointTrajectory, "arm/joint_trajectory", 1)
    wait(lambda: bool(conflicts()))
    (line,) = conflicts()
    assert line.startswith("publishers: 2 on /arm/joint_trajectory (")
    assert "/other_policy" in line and "/test_outputs" in line
    other.destroy_publisher(own)
    wait(lambda: not conflicts())
    for _ in range(2):
        other.create_publisher(JointState, "joint_states", 1)
    wait(lambda: bool(conflicts()))
    assert conflicts()[0].startswith("publishers: 2 on /joint_states (/other_policy, /other_policy")
    other.destroy_node()


def test_a_topic_may_be_given(node: Node) -> None:
    parameters = ControllerParameters(output="forward_position", topic="xs/commands")
    assert Output(node, "arm", parameters, ["a"], [0]).topic == "xs/commands"


def test_interbotix_without_its_messages_is_named(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs", None)
    with pytest.raises(ParameterError, match="interbotix_xs_msgs"):
        Output(node, "arm", ControllerParameters(output="interbotix"), ["a"], [0])


def test_interbotix_gets_its_group_command(
    node: Node, stream: CommandStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not on PyPI; a message with its fields stands in for it."""

    @dataclass
    class JointGroupCommand:
        name: str = ""
        cmd: list[float] = field(default_factory=list)

    sent: list = []
    messages = SimpleNamespace(JointGroupCommand=JointGroupCommand)
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs", SimpleNamespace(msg=messages))
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs.msg", messages)
    publisher = SimpleNamespace(publish=sent.append)
    monkeypatch.setattr(node, "create_publisher", lambda *_, **__: publisher)
    parameters = ControllerParameters(output="interbotix", group="arm")
    made = Output(node, "arm", parameters, ["c", "a"], [2, 0])
    made.send_command(stream, NOW_S)
    assert sent[0].name == "arm"
    np.testing.assert_allclose(sent[0].cmd, stream.commanded(NOW_S + DT_S).position[[2, 0]])
