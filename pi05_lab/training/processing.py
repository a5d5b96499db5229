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
from pi05_lab.training.augmentation import augment
from pi05_lab.training.config import ConfigError, DataConfig, TrainConfig
from pi05_lab.training.migration import migrate, table
from pi05_lab.training.plugins import Plugin
from pi05_ros.policy.action_tokens import ActionTokenError, ActionTokenizer
from pi05_ros.policy.bundle import Settings, make_robot, match_cameras, tokenizer_folder
from pi05_ros.policy.checkpoint import TOKENIZER_PATTERNS, checkpoint_folder, load_model
from pi05_ros.policy.config import IMAGE_PREFIX, PolicyConfig, read_config
from pi05_ros.policy.guidance import MAX_DELAY_KEY
from pi05_ros.policy.images import EMPTY, prepare_image
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.next_token import (
    ACTION_TOKENIZER,
    ActionLanguage,
    FastConfig,
    with_fast,
)
from pi05_ros.policy.processing import (
    ACTION,
    STATE,
    Processing,
    read_processing,
    tokenizer_name,
    write_processing,
)
from pi05_ros.policy.prompt import PromptTokenizer, Tokens, pi0_prompt, pi05_prompt
from pi05_ros.policy.robots import Robot
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import FloatArray, ImageArray

TOKENIZER_FILES = (*TOKENIZER_PATTERNS, "tokenizer.model")
STATISTICS_FRAMES = 20_000
FITTED_CHUNKS = 4_000
"""Chunks that action tokens are learnt from."""


@dataclass(frozen=True)
class DataProcessor:
    """Turns frames into a network's inputs: robot, statistics and tokenizer."""

    config: PolicyConfig
    robot: Robot
    processing: Processing
    tokenizer: PromptTokenizer
    cameras: dict[str, str]
    """The data's camera name → the network's."""
    data: DataConfig
    statistics: dict[str, dict[str, NDArray[np.float64]]]
    tokenizer_files: dict[str, bytes]
    language: ActionLanguage | None = None
    """Of the loss `fast`."""
    origin: str = ""
    """Markdown: what the network took from a checkpoint of another kind."""

    def images(
        self, frame: Mapping[str, ImageArray], rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """[n_cameras, 3, side, side] in the network's order, and [n_cameras] present.

        `frame` has the data's camera names. With `rng` images are augmented, where the
        configuration wants it.
        """
        side = self.config.image_size
        images = torch.full((len(self.config.cameras), 3, side, side), EMPTY)
        masks = torch.zeros(len(self.config.cameras), dtype=torch.bool)
        for camera, image in frame.items():
            name = self.cameras[camera]
            index = self.config.cameras.index(name)
            if camera in self.robot.rotated_cameras and not self.data.rotated_images:
                image = image[::-1, ::-1]
            images[index] = prepare_image(image, side, self.processing.convention)
            if self.data.augment and rng is not None:
                images[index] = augment(images[index], name, rng)
            masks[index] = True
        return images, masks

    def numbers(
        self, state: NDArray[np.float32], actions: NDArray[np.float32], task: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Tokens]:
        """State [state_dim] and actions [horizon, action_dim], normalised, and the prompt."""
        decoded, relative = _decode(self.robot, state, actions)
        normalized_state = self.processing.state.normalize(decoded)
        normalized_actions = self.processing.action.normalize(relative)
        if self.language is not None:
            text = self.language.prompt(task, normalized_state)
        elif self.config.kind == "pi05":
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

    def answer(self, actions: NDArray[np.float32]) -> NDArray[np.int64]:
        """The network's action tokens of a normalised chunk [horizon, action_dim]."""
        assert self.language is not None
        try:
            return np.array(self.language.answer(actions)[0], dtype=np.int64)
        except ActionTokenError as error:
            raise ConfigError(f"fast.length: {error}") from None


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
        return _start_from(checkpoint_folder(config.network.start), config, datasets)
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
        policy_config = _with_delay(network.config, config)
        processor = _make_processor(policy_config, Path(folder), config, datasets)
        network.config = processor.config
        return network, processor


def _start_from(
    path: Path, config: TrainConfig, datasets: Sequence[LeRobotDataset]
) -> tuple[Pi0, DataProcessor]:
    for key, value in vars(config.network).items():
        if key not in ("start", "kind") and value:
            raise ConfigError(
                f"network.{key} is for start: scratch; the checkpoint {path} has its own sizes"
            )
    # A base checkpoint does not have the robot's dimensions.
    first, migrated, origin = datasets[0], None, ""
    if config.network.kind == "pi05":
        torch.manual_seed(config.seed)
        migrated, rows = migrate(path)
        origin = table(rows)
    policy_config = read_config(path) if migrated is None else migrated.config
    if not policy_config.has_expert:
        raise ConfigError(
            f"network.start: {path} is {policy_config.name}, which has no action expert: start "
            "from π0.5 or π0"
        )
    policy_config = replace(policy_config, state_dim=first.state_dim, action_dim=first.action_dim)
    policy_config = _with_delay(policy_config, config)
    processor = _make_processor(policy_config, path, config, datasets)
    network = migrated or load_model(path, "cpu", torch.float32)
    network.config = processor.config
    return network.train(), replace(processor, origin=origin)


def _with_delay(policy: PolicyConfig, config: TrainConfig) -> PolicyConfig:
    """With the longest clean prefix that the training shows, which guidance needs to know."""
    longest = max(stage.rtc_max_delay for stage in config.stages)
    if longest == 0:
        return policy
    if policy.kind != "pi05":
        raise ConfigError("rtc_max_delay needs π0.5: π0 has one time for all steps of a chunk")
    if longest >= policy.horizon:
        raise ConfigError(f"rtc_max_delay {longest} must be below the horizon {policy.horizon}")
    return replace(policy, raw={**policy.raw, MAX_DELAY_KEY: longest})


def _make_processor(
    policy_config: PolicyConfig,
    folder: Path,
    config: TrainConfig,
    datasets: Sequence[LeRobotDataset],
) -> DataProcessor:
    """`folder` has the network's tokenizer, or names one of the Hugging Face cache."""
    found = tokenizer_folder(folder, tokenizer_name(folder))
    tokenizer = PromptTokenizer.from_directory(
        found, policy_config.token_length, policy_config.sizes.vocab
    )
    paths = [found / name for name in TOKENIZER_FILES]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    first = datasets[0]
    _check_alike(datasets, policy_config)
    adapt, delta = config.adapt_to_pi or None, config.delta_actions or None
    settings = Settings(adapt_to_pi=adapt, delta_actions=delta, dt_s=1.0 / first.fps)
    try:
        robot = make_robot(config.robot, policy_config, "lerobot", settings)
    except ValueError as error:
        raise ConfigError(f"{first.root}: {error}") from None
    for dataset in datasets:
        _check_names(dataset, robot)
    cameras = _match_cameras(first, robot, policy_config, config.data.rename)
    entries = zip(datasets, config.data.datasets, strict=True)
    counted = [dataset for dataset, entry in entries if entry.statistics]
    if not counted:
        raise ConfigError("data.datasets: at least one must have statistics: true")
    statistics = compute_statistics(counted, robot, policy_config.horizon, config)
    with tempfile.TemporaryDirectory() as name:
        written = Path(name)
        write_processing(written, policy_config, statistics, rename=rename_map(config.data.rename))
        processing = read_processing(written, policy_config, robot.state_dim, robot.action_dim)
    processor = DataProcessor(
        policy_config, robot, processing, tokenizer, cameras, config.data, statistics, files
    )
    if not any(stage.losses.get("fast", 0.0) > 0 for stage in config.stages):
        return processor
    return _with_language(processor, counted, folder, config)


def _with_language(
    processor: DataProcessor, datasets: Sequence[LeRobotDataset], folder: Path, config: TrainConfig
) -> DataProcessor:
    """With the action tokens of the loss `fast`; `folder` is the start checkpoint's."""
    settings, horizon = config.fast, processor.config.horizon
    if processor.config.kind != "pi05":
        raise ConfigError("the loss fast needs π0.5: π0's prompt has no state")
    try:
        if settings.tokenizer == "fit":
            stride = math.ceil(sum(map(len, datasets)) / FITTED_CHUNKS)
            chunks = [
                processor.numbers(d.state[k], d.actions(k, horizon)[0], d.task(k))[1]
                for d in datasets
                for k in range(0, len(d), stride)
            ]
            actions = ActionTokenizer.fit(np.stack(chunks), settings.scale, settings.vocab_size)
        elif settings.tokenizer == "start":
            actions = ActionTokenizer.load(folder / ACTION_TOKENIZER)
        else:
            actions = ActionTokenizer.load(checkpoint_folder(settings.tokenizer))
        placed = FastConfig(settings.prompt, settings.skip, settings.length)
        language = ActionLanguage(actions, processor.tokenizer, placed)
    except (ActionTokenError, CheckpointError) as error:
        raise ConfigError(f"fast: {error}") from None
    return replace(processor, config=with_fast(processor.config, placed), language=language)


def rename_map(rename: Mapping[str, str]) -> dict[str, str]:
    """`data.rename` in LeRobot's form, with full feature names."""
    return {IMAGE_PREFIX + old: IMAGE_PREFIX + new for old, new in rename.items()}


def _match_cameras(
    dataset: LeRobotDataset, robot: Robot, policy: PolicyConfig, rename: Mapping[str, str]
) -> dict[str, str]:
    for name in rename:
        if name not in dataset.cameras:
            raise ConfigError(
                f"data.rename: {dataset.root} has no camera {name!r}; it has "
                f"{', '.join(dataset.cameras)}"
            )
    names = {name: robot.cameras.get(name, name) for name in dataset.cameras}
    try:
        return match_cameras(names, policy.cameras, rename)
    except ValueError as error:
        raise ConfigError(
            f"{dataset.root}: {error}; name the match with data.rename, "
            f"as {{{dataset.cameras[0]}: {policy.cameras[0]}}}"
        ) from None


def _check_names(dataset: LeRobotDataset, robot: Robot) -> None:
    """Raise ConfigError where the data have the robot's joints in another order."""
    for key, ours in ((STATE, robot.state), (ACTION, robot.action)):
        if misplaced := dataset.meta.misplaced(key, ours):
            raise ConfigError(
                f"{dataset.root}: {key} is not in the order of robot {robot.name!r}: {misplaced}. "
                "Give a robot whose YAML description lists the names in the data's order"
            )


def _check_alike(datasets: Sequence[LeRobotDataset], config: PolicyConfig) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        found = {what: (getattr(first, what), getattr(other, what))
                 for what in ("fps", "cameras", "state_dim", "action_dim")}  # fmt: skip
        found |= {f"names of {k}": (first.meta.names(k), other.meta.names(k))
                  for k in (STATE, ACTION)}  # fmt: skip
        for what, (mine, theirs) in found.items():
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
