"""Parameters: declared once, checked with a message that names them, documented from the source."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rclpy.node import Node
from rclpy.parameter import Parameter

from pi05_ros import config as declared
from pi05_ros.config import (
    CameraParameters,
    ControllerParameters,
    JointParameters,
    ParameterError,
    PolicyParameters,
    SchedulerParameters,
    SimParameters,
)
from pi05_ros.nodes.main import share_directory
from pi05_ros.nodes.parameters import (
    declare,
    declare_named,
    declare_robot,
    unknown_overrides,
)
from pi05_ros.robot_config import read_robot_config

ROOT = Path(__file__).parents[3]


@pytest.fixture()
def make_node(ros: None) -> Iterator[Any]:
    nodes = []

    def make(**values: Any) -> Node:
        overrides = [Parameter(name.replace("__", "."), value=v) for name, v in values.items()]
        node = Node("test_parameters", parameter_overrides=overrides)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.destroy_node()


def joint(**changes: Any) -> JointParameters:
    values: dict[str, Any] = {
        "lower": -1.0,
        "upper": 1.0,
        "max_velocity": 2.0,
        "max_acceleration": 3.0,
    }
    return JointParameters(**{**values, **changes})


def test_values_come_from_the_overrides(make_node: Any) -> None:
    node = make_node(scheduler__ensemble_m=0.5, scheduler__method="latest")
    scheduling = declare(node, SchedulerParameters, "scheduler.")
    assert (scheduling.ensemble_m, scheduling.method) == (0.5, "latest")
    assert declare(node, PolicyParameters).control_rate_hz == 50.0
    assert "weight" in node.describe_parameter("scheduler.ensemble_m").description


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("control_rate_hz", 0.0),
        ("lead_s", float("nan")),
        ("num_steps", 0),
        ("publish", "never"),
        ("device", 3),
    ],
)
def test_bad_values_are_named(make_node: Any, name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=name):
        declare(make_node(**{name: value}), PolicyParameters)


def test_named_blocks(make_node: Any) -> None:
    node = make_node(cameras__names=["top"], cameras__top__topic="top/image")
    cameras = declare_named(node, "cameras", CameraParameters)
    assert cameras == {"top": CameraParameters(topic="top/image")}


def test_missing_names_point_to_the_params_file(make_node: Any) -> None:
    with pytest.raises(ParameterError, match=r"joints\.names.*params file"):
        declare_named(make_node(), "joints", JointParameters)


def test_typing_errors_are_found(make_node: Any) -> None:
    """Pins: rclpy drops a misspelt parameter silently, and the default applies."""
    node = make_node(cameras__names=["top"], cameras__top__required=True, cameras__tpo__topic="x")
    declare_named(node, "cameras", CameraParameters)
    assert unknown_overrides(node) == ["cameras.tpo.topic"]


def test_grippers_are_scaled_to_the_policy() -> None:
    joints = declared.joint_group({"g": joint(lower=0.0, policy_zero=0.02, policy_one=0.06)})
    assert joints.to_policy(joints.to_joints(joints.lower * 0 + 0.25))[0] == pytest.approx(0.25)
    assert joints.to_joints(joints.lower * 0 + 0.5)[0] == pytest.approx(0.04)


@pytest.mark.parametrize(
    "changes",
    [
        {"lower": 2.0},
        {"max_velocity": 0.0},
        {"max_acceleration": float("nan")},
        {"policy_one": 0.0},
    ],
)
def test_impossible_joints_are_named(changes: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match="elbow"):
        declared.joint_group({"elbow": joint(**changes)})


def test_a_scheduler_is_made_of_its_block() -> None:
    joints = declared.joint_group({"elbow": joint(), "lift": joint(), "grip": joint(gripper=True)})
    scheduler = SchedulerParameters("blend", newest_only=["lift"]).make(joints)
    assert type(scheduler).__name__ == "BlendScheduler"
    assert scheduler._gripper.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "newest"}, "sync, latest, blend"),
        ({"newest_only": ["elbo"]}, "no joint is called.*elbo"),
        ({"ensemble_order": "random"}, "oldest_first, newest_first"),
        ({"replan": "never"}, "free, steps, remaining"),
        ({"ensemble_m": float("nan")}, "ensemble_m' must be from -10 to 10"),
        ({"guard_confirmations": 0}, "guard_confirmations' must be from 1 to 10"),
        ({"speed_scale": 1.5}, "speed_scale' must be from 0 to 1"),
    ],
)
def test_a_scheduler_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    """Pins: a value that is set in motion is checked before the motion changes."""
    joints = declared.joint_group({"elbow": joint()})
    with pytest.raises(ParameterError, match=message):
        SchedulerParameters(**changes).make(joints)


def test_controllers_share_out_the_joints() -> None:
    joints = declared.joint_group({"a": joint(), "b": joint(), "c": joint()})
    columns = declared.controller_columns(
        {"one": ControllerParameters(["c", "a"]), "two": ControllerParameters(["b"])}, joints
    )
    assert columns == {"one": [2, 0], "two": [1]}


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (["a"], ["b"], r"no controller commands \['c'\]"),
        (["a", "b"], ["b", "c"], "'b' belongs to 'one'"),
        (["a", "x"], ["b", "c"], "'x' is not in joints.names"),
    ],
)
def test_joints_without_or_with_two_controllers(
    one: list[str], two: list[str], message: str
) -> None:
    joints = declared.joint_group({"a": joint(), "b": joint(), "c": joint()})
    with pytest.raises(ParameterError, match=message):
        declared.controller_columns(
            {"one": ControllerParameters(one), "two": ControllerParameters(two)}, joints
        )


def flattened(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in block.items():
        nested = isinstance(value, dict)
        flat |= flattened(value, f"{prefix}{key}__") if nested else {prefix + key: value}
    return flat


@pytest.mark.parametrize("name", ["aloha", "droid", "ur5e", "generic"])
def test_a_shipped_file_means_the_same_to_the_node_and_without_ros(
    make_node: Any, name: str
) -> None:
    """Pins: a key that was renamed in the code alone; an evaluation with other parameters."""
    file = ROOT / "config" / f"{name}.yaml"
    tree = yaml.safe_load(file.read_text())
    declared = declare_robot(make_node(**flattened(tree["/**/policy"]["ros__parameters"])))
    read = read_robot_config(file)
    assert declared.joints.joints == read.joints.joints
    assert replace(declared, joints=read.joints, camera_rate_hz=read.camera_rate_hz) == read


def test_the_simulators_parameters_are_known(make_node: Any) -> None:
    tree = yaml.safe_load((ROOT / "config" / "aloha.yaml").read_text())
    sim = make_node(**tree["/**/aloha_sim"]["ros__parameters"])
    assert declare(sim, SimParameters).width == 640
    assert unknown_overrides(sim) == []


def test_docs_are_generated_from_the_declarations() -> None:
    assert (ROOT / "docs" / "parameters.md").read_text() == declared.markdown()


def test_share_directory_has_the_transport_profile() -> None:
    assert (share_directory() / "config" / "fastdds_shm.xml").is_file()


@pytest.mark.parametrize(
    ("group", "declaration", "topic"),
    [
        ("cameras", CameraParameters, "a b"),
        ("cameras", CameraParameters, "/cam//image"),
        ("cameras", CameraParameters, "1cam/image"),
        ("cameras", CameraParameters, "cam/"),
        ("cameras", CameraParameters, "a" * 300),
        ("controllers", ControllerParameters, "arm-1/commands"),
        ("controllers", ControllerParameters, "arm\x1b[31m"),
    ],
)
def test_a_bad_topic_name_is_one_line(
    make_node: Any, group: str, declaration: type, topic: str
) -> None:
    """Pins: a traceback from the middleware, without the parameter's name."""
    node = make_node(**{f"{group}__names": ["one"], f"{group}__one__topic": topic})
    with pytest.raises(ParameterError, match=f"parameter '{group}.one.topic'") as error:
        declare_named(node, group, declaration)
    assert str(error.value).isprintable()


def test_a_name_that_is_no_topic_needs_one(make_node: Any) -> None:
    node = make_node(cameras__names=["front left"])
    with pytest.raises(ParameterError, match=r"'front left/image_raw' is no ROS topic name"):
        declare_named(node, "cameras", CameraParameters)
    node = make_node(**{"cameras__names": ["front left"], "cameras__front left__topic": "/front"})
    assert list(declare_named(node, "cameras", CameraParameters)) == ["front left"]


@pytest.mark.parametrize(
    ("group", "declaration", "topics"),
    [
        ("cameras", CameraParameters, ("/top/image", "top/image")),
        ("cameras", CameraParameters, ("", "one/image_raw")),
        ("controllers", ControllerParameters, ("/arm/commands", "/arm/commands")),
        ("controllers", ControllerParameters, ("", "one/joint_trajectory")),
    ],
)
def test_two_on_one_topic_are_refused(
    make_node: Any, group: str, declaration: type, topics: tuple[str, str]
) -> None:
    """Pins: two controllers whose commands fight, two cameras with one image."""
    first, second = topics
    node = make_node(
        **{
            f"{group}__names": ["one", "two"],
            f"{group}__one__topic": first,
            f"{group}__two__topic": second,
        }
    )
    with pytest.raises(ParameterError, match=r"is the topic of 'one' already"):
        declare_named(node, group, declaration)


def test_one_camera_raw_and_compressed_is_two_topics(make_node: Any) -> None:
    node = make_node(
        cameras__names=["one", "two"],
        cameras__one__topic="/top",
        cameras__two__topic="/top",
        cameras__two__transport="compressed",
    )
    assert len(declare_named(node, "cameras", CameraParameters)) == 2


@pytest.mark.parametrize("names", [[1, 2], [0.5], "one", True])
def test_names_that_are_no_list_of_texts_are_refused(make_node: Any, names: Any) -> None:
    """Pins: a traceback for joints named 1, 2, … in a params file."""
    node = make_node(joints__names=names)
    with pytest.raises(ParameterError, match=r"'joints.names' must be a list of names"):
        declare_named(node, "joints", JointParameters)


@pytest.mark.parametrize("key", ["upper", "max_velocity", "max_acceleration", "policy_one"])
def test_a_limit_whose_range_overflows_is_refused(key: str) -> None:
    """Pins: limits of 1e308, whose range is infinite, that ended in NaN commands."""
    with pytest.raises(ParameterError, match=r"joints\.a\.\*.*beyond 1e\+06"):
        declared.joint_group({"a": joint(**{key: 1e308})})
    with pytest.raises(ParameterError, match=r"beyond 1e\+06"):
        declared.joint_group({"a": joint(lower=-1e308, upper=1e308)})
