"""Declares a node's ROS parameters from the dataclasses of `pi05_ros.config`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from pi05_ros.config import (
    CameraParameters,
    ControllerParameters,
    ParameterError,
    check_value,
    default_of,
    fields_of,
)
from pi05_ros.robot_config import RobotConfig, make_robot_config

T = TypeVar("T")

MAX_TOPIC_CHARS = 200
_PART = r"[A-Za-z_][A-Za-z0-9_]*"
_TOPIC = re.compile(rf"(~/|/)?{_PART}(/{_PART})*")


def declare_robot(node: Node) -> RobotConfig:
    """Declare all parameters of the policy node and return their values.

    Raises:
        ParameterError: a value that cannot be used, or an override that no parameter has.
    """
    config = make_robot_config(
        functools.partial(declare, node), functools.partial(declare_named, node)
    )
    if unknown := unknown_overrides(node):
        raise ParameterError(
            f"unknown parameters {unknown}; docs/parameters.md lists those that exist"
        )
    return config


def _descriptor(entry: dataclasses.Field[Any]) -> ParameterDescriptor:
    meta = entry.metadata
    text = meta["description"]
    if meta["choices"]:
        text += f" ({', '.join(meta['choices'])})"
    descriptor = ParameterDescriptor(description=text)
    lower, upper = meta["within"]
    if lower is not None and entry.type == "float":
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=float(lower), to_value=float(upper), step=0.0)
        ]
    if lower is not None and entry.type == "int":
        largest = 2**31 - 1 if upper is None else int(upper)
        descriptor.integer_range = [IntegerRange(from_value=int(lower), to_value=largest, step=1)]
    return descriptor


def declare(node: Node, declaration: type[T], prefix: str = "") -> T:
    """Declare every field of `declaration` below `prefix` and return the values.

    Raises:
        ParameterError: a value of the wrong type, out of range or not among the choices.
    """
    values = {}
    for entry in fields_of(declaration):
        name = prefix + entry.name
        try:
            if not node.has_parameter(name):
                node.declare_parameter(name, default_of(entry), _descriptor(entry))
            value = node.get_parameter(name).value
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ParameterError(f"parameter {name!r}: {error}") from error
        check_value(name, entry, value)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        values[entry.name] = list(value) if is_list else value
    return declaration(**values)


def declare_named(node: Node, group: str, declaration: type[T]) -> dict[str, T]:
    """Declare `<group>.names` and a block `<group>.<name>.*` for each of them."""
    names_parameter = f"{group}.names"
    if not node.has_parameter(names_parameter):
        try:
            node.declare_parameter(
                names_parameter, [""], ParameterDescriptor(description=f"the names of the {group}")
            )
        except InvalidParameterTypeException as error:
            raise ParameterError(
                f"parameter {names_parameter!r} must be a list of names; put numbers in quotes: "
                f"{error}"
            ) from error
    names = [name for name in node.get_parameter(names_parameter).value if name]
    if not names:
        raise ParameterError(
            f"parameter {names_parameter!r} is empty; give a params file with it, "
            "config/aloha.yaml for example"
        )
    if len(set(names)) != len(names):
        raise ParameterError(f"parameter {names_parameter!r} repeats a name: {names}")
    blocks = {name: declare(node, declaration, f"{group}.{name}.") for name in names}
    with_topics = (CameraParameters, ControllerParameters)
    topics = {n: b.topic_of(n) for n, b in blocks.items() if isinstance(b, with_topics)}
    if fault := _topic_fault(group, topics, node.get_namespace()):
        raise ParameterError(fault)
    return blocks


def _topic_fault(key: str, topics: Mapping[str, str], namespace: str) -> str:
    """First fault among the topics (by name) of `key`, "cameras" or "controllers", in one line.

    "" without one: valid names, and no two of them on one topic.
    """
    owners: dict[str, str] = {}
    for name, topic in topics.items():
        where = f"parameter '{key}.{name}.topic'"
        if len(topic) > MAX_TOPIC_CHARS:
            return f"{where} has {len(topic)} characters, at most {MAX_TOPIC_CHARS} are allowed"
        if not _TOPIC.fullmatch(topic):
            return (
                f"{where}: {topic!r} is no ROS topic name: letters, digits and _, parts separated "
                "by /, no part begins with a digit"
            )
        absolute = topic if topic.startswith(("/", "~")) else f"{namespace.rstrip('/')}/{topic}"
        if absolute in owners:
            return (
                f"{where}: {absolute!r} is the topic of {owners[absolute]!r} already; "
                "each needs one of its own"
            )
        owners[absolute] = name
    return ""


def whole_numbers_as_floats(node: Node, changes: list[Parameter]) -> list[Parameter]:
    """`ros2 param set` reads 0 as an integer, which a parameter with decimals accepts too."""
    return [
        Parameter(change.name, Parameter.Type.DOUBLE, float(change.value))
        if change.type_ is Parameter.Type.INTEGER
        and node.has_parameter(change.name)
        and node.get_parameter(change.name).type_ is Parameter.Type.DOUBLE
        else change
        for change in changes
    ]


def unknown_overrides(node: Node) -> list[str]:
    """Names in a params file or on the command line that are not declared: typing errors.

    rclpy ignores them silently and has no public list of them.
    """
    given: Iterable[str] = getattr(node, "_parameter_overrides", {})
    return sorted(name for name in given if not node.has_parameter(name))
