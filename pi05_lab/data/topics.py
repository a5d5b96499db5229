"""Topics of a recording, by the policy node's params file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pi05_ros.robot_config import RobotConfig, default_params_file, read_robot_config

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


@dataclass(frozen=True)
class Camera:
    """A camera of the params file."""

    name: str
    topic: str
    """Absolute, of the raw images; compressed ones are on `<topic>/compressed`."""
    transport: str
    required: bool

    @property
    def topics(self) -> dict[str, str]:
        """Topic → message type, the configured transport first."""
        both = {self.topic: IMAGE, f"{self.topic}/compressed": COMPRESSED_IMAGE}
        return both if self.transport == "raw" else dict(reversed(both.items()))


@dataclass(frozen=True)
class Controller:
    """A controller of the params file."""

    name: str
    topic: str
    output: str
    columns: tuple[int, ...]
    """Of its joints, in its order, among the robot's joints."""


@dataclass(frozen=True)
class EvaluatedRobot:
    """A robot and its topics, by the params file."""

    config: RobotConfig
    cameras: tuple[Camera, ...]
    controllers: tuple[Controller, ...]
    joint_topic: str
    instruction_topics: tuple[str, ...]
    """`instruction`, and the node's latched copy, which a recording that starts later still has."""
    robot: str
    """`robot` of `Policy.from_pretrained`: a name, or a file beside the params file."""

    @property
    def checkpoint(self) -> str:
        return self.config.parameters.checkpoint

    def record_command(self) -> str:
        """The command that records the topics of an evaluation."""
        topics = [next(iter(camera.topics)) for camera in self.cameras]
        topics += [self.joint_topic, *self.instruction_topics]
        topics += [controller.topic for controller in self.controllers]
        return " \\\n  ".join(
            ["ros2 bag record --storage mcap --output BAG", "--topics " + " ".join(topics)]
        )


def read_evaluated_robot(
    path: str | Path | None = None,
    namespace: str = "",
    node: str = "policy",
    urdf: str | Path | None = None,
) -> EvaluatedRobot:
    """Read the policy node's params file; None is config/aloha.yaml.

    `namespace` is that of the recorded topics, `node` the recorded policy node's name.

    Raises:
        RobotConfigError: see `read_robot_config`.
    """
    file = default_params_file() if path is None else Path(path)
    config = read_robot_config(file, urdf)
    parameters = config.parameters
    space = "/" + namespace.strip("/")

    def absolute(topic: str) -> str:
        return topic if topic.startswith("/") else f"{space.rstrip('/')}/{topic}"

    beside = file.parent / parameters.robot
    cameras = []
    for name, camera in config.cameras.items():
        topic = absolute(camera.topic or f"{name}/image_raw")
        cameras.append(Camera(name, topic, camera.transport, camera.required))
    controllers = []
    for name, own in config.controllers.items():
        topic = absolute(own.topic_of(name))
        controllers.append(Controller(name, topic, own.output, tuple(config.columns[name])))
    return EvaluatedRobot(
        config,
        tuple(cameras),
        tuple(controllers),
        absolute("joint_states"),
        (absolute("instruction"), absolute(f"{node}/active_instruction")),
        str(beside) if beside.is_file() else parameters.robot,
    )
