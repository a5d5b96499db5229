"""All of a checkpoint but its weights, brought together with a robot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pi05_ros.policy.config import PolicyConfig, read_config
from pi05_ros.policy.hub import cached_tokenizer, checkpoint_folder
from pi05_ros.policy.normalize import Convention
from pi05_ros.policy.processors import Processing, convention_of, read_processing
from pi05_ros.policy.prompt import PromptTokenizer
from pi05_ros.policy.robots import Robot, Settings, make_robot, match_cameras
from pi05_ros.policy.weights import CheckpointError

RobotSource = str | Path | Mapping[str, Any]
"""A robot's name, the path of its YAML description, or a mapping of the same keys."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint that fits a robot, as far as its small files tell."""

    directory: Path
    config: PolicyConfig
    settings: Settings
    convention: Convention
    robot: Robot
    processing: Processing
    cameras: Mapping[str, str]
    """The robot's camera name → the network's."""

    def tokenizer(self) -> PromptTokenizer:
        """The folder's tokenizer, or PaliGemma's from the hub cache.

        Raises:
            CheckpointError: neither is there, or it is damaged.
        """
        return open_tokenizer(self.directory, self.config, self.processing.tokenizer)


def open_tokenizer(directory: Path, config: PolicyConfig, name: str) -> PromptTokenizer:
    """See `Opened.tokenizer`; `name` is the hub's name of the tokenizer."""
    folder = directory
    if not (directory / "tokenizer.json").is_file():
        folder = cached_tokenizer(name) or directory
    return PromptTokenizer.from_directory(folder, config.token_length, config.sizes.vocab)


def open_checkpoint(path: str | Path, robot: RobotSource) -> Opened:
    """Read everything but the weights.

    Raises:
        CheckpointError: not a usable checkpoint, or one that does not fit the robot.
    """
    directory = checkpoint_folder(path)
    config = read_config(directory)
    settings = Settings.read(directory)
    convention = convention_of(directory)
    try:
        body = make_robot(robot, config, convention, settings)
        processing = read_processing(directory, config, body.state_dim, body.action_dim)
        rename = {**processing.rename, **settings.cameras}
        cameras = match_cameras(body.cameras, config.cameras, rename)
        body = heed_files(body, processing, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return Opened(directory, config, settings, convention, body, processing, cameras)


def heed_files(robot: Robot, processing: Processing, settings: Settings) -> Robot:
    """What LeRobot's files say of deltas and prompt comes before what the robot usually has."""
    if processing.delta_mask is not None and settings.delta_actions is None:
        robot = replace(robot, delta_mask=processing.delta_mask)
    candidates = (settings.state_in_prompt, processing.state_in_prompt, robot.state_in_prompt)
    said = [value for value in candidates if value is not None]
    return replace(robot, state_in_prompt=said[0] if said else True)
