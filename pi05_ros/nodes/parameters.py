"""Declares a node's ROS parameters from the dataclasses of `pi05_ros.config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node

from pi05_ros.config import ParameterError, fields_of
from pi05_ros.topic_checks import topic_fault

T = TypeVar("T")


@runtime_checkable
class HasTopic(Protocol):
    """A block of parameters with a topic of its own."""

    def topic_of(self, name: str) -> str: ...


def _descriptor(entry: dataclasses.Field[Any]) -> ParameterDescriptor:
    meta = entry.metadata
    text = meta["description"]
    if meta["choices"]:
        text += f" ({', '.join(meta['choices'])})"
    descriptor = ParameterDescriptor(description=text)
    lower, upper = meta["lower"], meta["upper"]
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
                default = (
                    entry.default_factory()
                    if entry.default_factory is not dataclasses.MISSING
                    else entry.default
                )
                node.declare_parameter(name, default, _descriptor(entry))
            value = node.get_parameter(name).value
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ParameterError(f"parameter {name!r}: {error}") from error
        choices = entry.metadata["choices"]
        if choices and value not in choices:
            raise ParameterError(f"parameter {name!r} is {value!r}; it may be {', '.join(choices)}")
        values[entry.name] = list(value) if isinstance(value, Sequence) and not isinstance(
            value, str
        ) else value  # fmt: skip
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
    topics = {
        name: block.topic_of(name) for name, block in blocks.items() if isinstance(block, HasTopic)
    }
    fault = topic_fault(group, topics, node.get_namespace())
    if fault:
        raise ParameterError(fault)
    return blocks


def unknown_overrides(node: Node) -> list[str]:
    """Names given in a params file or on the command line that nothing declares: typing errors.

    rclpy drops them silently and has no public list of them.
    """
    given: Iterable[str] = getattr(node, "_parameter_overrides", {})
    return sorted(name for name in given if not node.has_parameter(name))
