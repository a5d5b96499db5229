"""Which topics of a recording mean what, by the policy node's params file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pi05_ros.evaluation.robot_config import (
    RobotConfig,
    RobotConfigError,
    default_params_file,
    read_robot_config,
)

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
JOINT_STATE = "sensor_msgs/msg/JointState"
STRING = "std_msgs/msg/String"

COMMAND_TYPES = {
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "forward_position": "std_msgs/msg/Float64MultiArray",
    "interbotix": "interbotix_xs_msgs/msg/JointGroupCommand",
}
"""Output of a controller → message type, for those that command positions."""
NUM_STEPS = 10
"""The policy node's default."""
_ENDINGS = {"joint_trajectory": "joint_trajectory", "interbotix": "commands/joint_group"}


@dataclass(frozen=True)
class Camera:
    """A camera of the params file."""

    name: str
    topic: str
    """Absolute, of the raw pictures; the compressed ones are on `<topic>/compressed`."""
    transport: str
    required: bool

    @property
    def topics(self) -> dict[str, str]:
        """Topic → message type, the configured transport first."""
        both = {self.topic: IMAGE, f"{self.topic}/compressed": COMPRESSED_IMAGE}
        return both if self.transport == "raw" else dict(reversed(both.items()))


@dataclass(frozen=True)
class Controller:
    """A controller whose commands may have been recorded."""

    name: str
    topic: str
    output: str
    columns: tuple[int, ...]
    """Of its joints, in its order, in the robot's joints."""


@dataclass(frozen=True)
class EvaluatedRobot:
    """A robot, its topics, and what its params file runs."""

    config: RobotConfig
    cameras: tuple[Camera, ...]
    controllers: tuple[Controller, ...]
    joint_topic: str
    instruction_topics: tuple[str, ...]
    """`instruction`, and the latched repetition that a recording begun later still has."""
    checkpoint: str
    robot: str
    """What `Policy.from_pretrained` takes."""
    num_steps: int
    dtype: str | None
    guidance: tuple[tuple[str, Any], ...]
    """Of the sampler, for the scheduler rtc."""

    def record_command(self) -> str:
        """The command that records what an evaluation needs."""
        topics = [topic for camera in self.cameras for topic in list(camera.topics)[:1]]
        topics += [self.joint_topic, *self.instruction_topics]
        topics += [controller.topic for controller in self.controllers]
        return " \\\n  ".join(
            ["ros2 bag record --storage mcap --output BAG", "--topics " + " ".join(topics)]
        )


def read_evaluated_robot(
    path: str | Path | None = None, namespace: str = "", node: str = "policy"
) -> EvaluatedRobot:
    """Read a params file of the policy node.

    Args:
        path: the file; None is config/aloha.yaml.
        namespace: of the recorded topics.
        node: name of the recorded policy node.

    Raises:
        RobotConfigError: not there, or a key is missing or of the wrong type.
    """
    file = default_params_file() if path is None else Path(path)
    config = read_robot_config(file)
    block = _policy_block(yaml.safe_load(file.read_text(encoding="utf-8")))
    space = "/" + namespace.strip("/")

    def absolute(topic: str) -> str:
        return topic if topic.startswith("/") else f"{space.rstrip('/')}/{topic}"

    try:
        cameras = tuple(_camera(block["cameras"], name, absolute) for name in _names(block))
    except (KeyError, TypeError) as error:
        raise RobotConfigError(
            f"{file}: cameras must be a block with names and one block each ({error})"
        ) from None
    dtype = str(block.get("dtype", "auto"))
    guidance = block.get("guidance", {})
    robot = str(block.get("robot", "aloha"))
    beside = file.parent / robot
    return EvaluatedRobot(
        config,
        cameras,
        tuple(
            _controller(block["controllers"], name, columns, absolute)
            for name, columns in config.controllers.items()
        ),
        absolute("joint_states"),
        (absolute("instruction"), absolute(f"{node}/active_instruction")),
        str(block.get("checkpoint", "small")),
        str(beside) if beside.is_file() else robot,
        int(block.get("num_steps", NUM_STEPS)),
        None if dtype == "auto" else dtype,
        tuple(sorted(guidance.items())) if isinstance(guidance, Mapping) else (),
    )


def _policy_block(document: Any) -> Mapping[str, Any]:
    for entry in document.values():
        block = entry.get("ros__parameters", {}) if isinstance(entry, Mapping) else {}
        if "joints" in block:
            return block
    raise RobotConfigError("no node has ros__parameters with joints")


def _names(block: Mapping[str, Any]) -> list[str]:
    names = block["cameras"]["names"]
    if not isinstance(names, list) or not names:
        raise TypeError("cameras.names must be a list")
    return [str(name) for name in names]


def _camera(block: Mapping[str, Any], name: str, absolute: Any) -> Camera:
    own = block.get(name, {})
    transport = str(own.get("transport", "raw"))
    if transport not in ("raw", "compressed"):
        raise TypeError(f"cameras.{name}.transport is {transport!r}, raw or compressed are known")
    topic = absolute(str(own.get("topic", "") or f"{name}/image_raw"))
    return Camera(name, topic, transport, bool(own.get("required", True)))


def _controller(
    block: Mapping[str, Any], name: str, columns: list[int], absolute: Any
) -> Controller:
    own = block[name]
    output = str(own.get("output", "joint_trajectory"))
    topic = str(own.get("topic", "") or f"{name}/{_ENDINGS.get(output, 'commands')}")
    return Controller(name, absolute(topic), output, tuple(columns))
