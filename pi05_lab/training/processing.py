"""Recorded frames become network inputs, by the functions of inference and their inverses."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.plugins import Plugin
from pi05_ros.policy.bundle import Settings, make_robot, match_cameras
from pi05_ros.policy.checkpoint import TOKENIZER_PATTERNS, load_model
from pi05_ros.policy.config import PolicyConfig, read_config
from pi05_ros.policy.images import EMPTY, prepare_image
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.processing import ACTION, STATE, Processing, read_processing, write_processing
from pi05_ros.policy.prompt import PromptTokenizer, Tokens, pi0_prompt, pi05_prompt
from pi05_ros.policy.robots import Robot
from pi05_ros.types import FloatArray, ImageArray

TOKENIZER_FILES = (*TOKENIZER_PATTERNS, "tokenizer.model")
STATISTICS_FRAMES = 20_000


@dataclass(frozen=True)
class DataProcessor:
    """Turns frames into a network's inputs: robot, statistics and tokenizer."""

    config: PolicyConfig
    robot: Robot
    processing: Processing
    tokenizer: PromptTokenizer
    cameras: dict[str, str]
    """The data's camera name → the network's."""
    statistics: dict[str, dict[str, NDArray[np.float64]]]
    tokenizer_files: dict[str, bytes]

    def images(self, frame: Mapping[str, ImageArray]) -> tuple[Tensor, Tensor]:
        """[n_cameras, 3, side, side] in the network's order, and [n_cameras] present.

        `frame` has the data's camera names.
        """
        side = self.config.image_size
        images = torch.full((len(self.config.cameras), 3, side, side), EMPTY)
        masks = torch.zeros(len(self.config.cameras), dtype=torch.bool)
        for camera, image in frame.items():
            index = self.config.cameras.index(self.cameras[camera])
            images[index] = prepare_image(image, side, self.processing.convention)
            masks[index] = True
        return images, masks

    def numbers(
        self, state: NDArray[np.float32], actions: NDArray[np.float32], task: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Tokens]:
        """State [state_dim] and actions [horizon, action_dim], normalised, and the prompt."""
        decoded, relative = _decode(self.robot, state, actions)
        normalized_state = self.processing.state.normalize(decoded)
        normalized_actions = self.processing.action.normalize(relative)
        if self.config.kind == "pi05":
            text = pi05_prompt(task, normalized_state)
        else:
            text = pi0_prompt(task, self.processing.convention)
        tokens = self.tokenizer.encode(text)
        if tokens.dropped:
            raise ConfigError(
                f"the prompt of {task!r} is {tokens.dropped} tokens longer than the network's "
                f"{len(tokens.ids)}: its state would be cut off; shorten the instruction"
            )
        return normalized_state.astype(np.float32), normalized_actions.astype(np.float32), tokens


def _decode(
    robot: Robot, state: NDArray[np.float32], actions: NDArray[np.float32]
) -> tuple[FloatArray, FloatArray]:
    """State and actions in the network's units; actions relative to the state where they are."""
    decoded = robot.decode_state(state.astype(np.float64))
    return decoded, robot.to_delta(robot.decode_action(actions.astype(np.float64)), decoded)


def start(
    config: TrainConfig, datasets: Sequence[LeRobotDataset], plugin: Plugin | None = None
) -> tuple[Pi0, DataProcessor]:
    """The network that training begins with, and its processing.

    Raises:
        ConfigError: data and network do not fit, or no plug-in brings a network from scratch.
        CheckpointError: `network.start` is no usable checkpoint.
    """
    if config.network.start != "scratch":
        return _start_from(Path(config.network.start).expanduser(), config, datasets)
    if plugin is None:
        raise ConfigError(
            "network.start: scratch needs a plug-in that makes the network; set plugin, as in "
            "examples/small_policy/train_small.yaml, or start from a checkpoint"
        )
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            network = plugin.make_network(config, datasets[0], Path(folder))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"network: {error}") from None
        return network, _make_processor(network.config, Path(folder), config, datasets)


def _start_from(
    path: Path, config: TrainConfig, datasets: Sequence[LeRobotDataset]
) -> tuple[Pi0, DataProcessor]:
    for key, value in vars(config.network).items():
        if key != "start" and value:
            raise ConfigError(
                f"network.{key} is for start: scratch; the checkpoint {path} has its own sizes"
            )
    # A base checkpoint does not have the robot's dimensions.
    policy_config = replace(
        read_config(path), state_dim=datasets[0].state_dim, action_dim=datasets[0].action_dim
    )
    processor = _make_processor(policy_config, path, config, datasets)
    network = load_model(path, "cpu", torch.float32).train()
    network.config = policy_config
    return network, processor


def _make_processor(
    policy_config: PolicyConfig,
    tokenizer_folder: Path,
    config: TrainConfig,
    datasets: Sequence[LeRobotDataset],
) -> DataProcessor:
    tokenizer = PromptTokenizer.from_directory(
        tokenizer_folder, policy_config.token_length, policy_config.sizes.vocab
    )
    paths = [tokenizer_folder / name for name in TOKENIZER_FILES]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    first = datasets[0]
    _check_alike(datasets, policy_config)
    adapt, delta = config.adapt_to_pi or None, config.delta_actions or None
    settings = Settings(adapt_to_pi=adapt, delta_actions=delta, dt_s=1.0 / first.fps)
    try:
        robot = make_robot(config.robot, policy_config, "lerobot", settings)
        names = {name: robot.cameras.get(name, name) for name in first.cameras}
        cameras = match_cameras(names, policy_config.cameras, {})
    except ValueError as error:
        raise ConfigError(f"{first.root}: {error}") from None
    entries = zip(datasets, config.data.datasets, strict=True)
    counted = [dataset for dataset, entry in entries if entry.statistics]
    if not counted:
        raise ConfigError("data.datasets: at least one must have statistics: true")
    statistics = compute_statistics(counted, robot, policy_config.horizon, config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_processing(folder, policy_config, statistics)
        processing = read_processing(folder, policy_config, robot.state_dim, robot.action_dim)
    return DataProcessor(policy_config, robot, processing, tokenizer, cameras, statistics, files)


def _check_alike(datasets: Sequence[LeRobotDataset], config: PolicyConfig) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        for what in ("fps", "cameras", "state_dim", "action_dim"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                raise ConfigError(
                    f"{first.root} and {other.root} cannot be trained on together: {what} "
                    f"{mine} and {theirs}"
                )
    for what in ("state_dim", "action_dim"):
        size, limit = getattr(first, what), getattr(config, f"max_{what}")
        if size > limit:
            raise ConfigError(f"{first.root}: {what} {size}, the network takes at most {limit}")


def compute_statistics(
    datasets: Sequence[LeRobotDataset], robot: Robot, horizon: int, config: TrainConfig
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """mean, std, min, max, q01 and q99 of states and actions in the network's units.

    The dataset's own statistics are of the recorded units and of absolute actions. Actions are
    those of whole chunks.
    """
    stride = math.ceil(sum(map(len, datasets)) / STATISTICS_FRAMES)
    pairs = [
        _decode(robot, dataset.state[frame], dataset.actions(frame, horizon)[0])
        for dataset in datasets
        for frame in range(0, len(dataset), stride)
    ]
    states, actions = zip(*pairs, strict=True)
    statistics = {}
    for feature, values in ((STATE, np.stack(states)), (ACTION, np.concatenate(actions))):
        low, high = np.quantile(values, (0.01, 0.99), axis=0)
        center = (low + high) / 2
        half = np.maximum((high - low) / 2, config.data.minimum_half_range)
        statistics[feature] = {
            "min": values.min(0),
            "max": values.max(0),
            "mean": values.mean(0),
            "std": values.std(0),
            "q01": center - half,
            "q99": center + half,
        }
    return statistics
