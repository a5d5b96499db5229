"""Settings of the controllers themselves under which no limit holds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import GetParameters
from rclpy.node import Node

from pi05_ros.nodes.outputs import Output

REPLACEMENT = "allow_trajectory_replacement"
ANSWER_S = 1.0
"""A node that has not answered by then has no such parameter: a driver, a simulator."""


@dataclass
class _Controller:
    client: Any
    """None once the answer is there."""
    since_s: float
    asked: Any = None
    replaces: bool = False


class ControllerCheck:
    """Reads the parameters of each node that subscribes to trajectories, once per subscription.

    joint_trajectory_controller executes every message late by its age, a step back each time, where
    `allow_trajectory_replacement` is true: its default from ros2_controllers 6.8 on
    (docs/controllers.md).
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._controllers: dict[str, _Controller] = {}

    def problems(self, outputs: Iterable[Output]) -> list[str]:
        """Why nothing may move; called on the node's executor, some times a second."""
        names = {name for output in outputs if not output.direct for name in output.controllers}
        for name in set(self._controllers) - names:
            self._release(self._controllers.pop(name))
        return [problem for name in sorted(names) if (problem := self._problem(name))]

    def clear(self) -> None:
        """Drop all: the outputs are gone."""
        for controller in self._controllers.values():
            self._release(controller)
        self._controllers.clear()

    def _problem(self, name: str) -> str:
        controller = self._controllers.get(name)
        if controller is None:
            client = self._node.create_client(GetParameters, f"{name}/get_parameters")
            controller = self._controllers[name] = _Controller(client, time.monotonic())
        if controller.client is not None:
            self._read(controller)
        if controller.replaces:
            return (
                f"controllers: {name} has {REPLACEMENT}: true, which breaks the limits; set it to "
                "false (docs/controllers.md) and restart the controller"
            )
        if controller.client is not None:
            return f"controllers: the settings of {name} are not read yet"
        return ""

    def _read(self, controller: _Controller) -> None:
        if controller.asked is None and controller.client.service_is_ready():
            controller.asked = controller.client.call_async(
                GetParameters.Request(names=[REPLACEMENT])
            )
        if controller.asked is not None and controller.asked.done():
            values = controller.asked.result().values
            controller.replaces = any(
                value.type == ParameterType.PARAMETER_BOOL and value.bool_value for value in values
            )
            self._release(controller)
        elif time.monotonic() - controller.since_s > ANSWER_S:
            self._release(controller)

    def _release(self, controller: _Controller) -> None:
        if controller.client is not None:
            self._node.destroy_client(controller.client)
            controller.client = None
