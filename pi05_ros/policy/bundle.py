"""The files of a checkpoint other than its weights, matched with a robot.

A checkpoint's own settings come first, then LeRobot's processor files, then the robot's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

from pi05_ros.policy.checkpoint import cached_tokenizer, checkpoint_folder
from pi05_ros.policy.config import PolicyConfig, read_config
from pi05_ros.policy.processing import Convention, Processing, convention_of, read_processing
from pi05_ros.policy.prompt import TOKENIZER_FILE, PromptTokenizer
from pi05_ros.policy.robots import (
    GENERIC,
    NAMED,
    Robot,
    RobotSource,
    has_type,
    read_robot,
    value_numbers,
)
from pi05_ros.policy.weights import CheckpointError, read_json

SETTINGS_FILE = "pi05_ros.json"


@dataclass(frozen=True)
class Settings:
    """A checkpoint folder's pi05_ros.json: what its other files lack. Every key is optional."""

    robot: str | None = None
    adapt_to_pi: bool | None = None
    delta_actions: bool | None = None
    dt_s: float | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    """The robot's camera name → the checkpoint's, where the names differ from the usual ones."""
    state_in_prompt: bool | None = None
    """Whether π0.5's prompt has the state; openpi's pi05_libero leaves it out."""
    head: str | None = None
    """"flow" or "fast": what predicts the actions; flow without an entry."""
    trained: bool | None = None
    note: str = ""
    """For a person, such as "random weights, seed 0"."""

    @classmethod
    def read(cls, directory: Path) -> Settings:
        """Read the folder's pi05_ros.json; without the file, the defaults.

        Raises:
            CheckpointError: not JSON, an unknown key, or a value of the wrong type.
        """
        path = directory / SETTINGS_FILE
        if not path.is_file():
            return cls()
        document = read_json(path)
        known = {f.name: str(f.type) for f in fields(cls)}
        for key, value in document.items():
            if key not in known:
                raise CheckpointError(f"{path}: unknown key {key!r}; known: {sorted(known)}")
            fits = has_type(known[key], value)
            if not fits or (key == "dt_s" and value is not None and not 0 < value < 10):
                raise CheckpointError(f"{path}: {key} must not be {value!r}")
        return cls(**document)


class Dimensions(Protocol):
    """What a checkpoint says about its inputs and outputs."""

    @property
    def state_dim(self) -> int | None: ...
    @property
    def action_dim(self) -> int | None: ...
    @property
    def max_state_dim(self) -> int: ...
    @property
    def max_action_dim(self) -> int: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...


def make_robot(
    robot: RobotSource,
    config: Dimensions,
    convention: Convention,
    settings: Settings,
) -> Robot:
    """A robot with the conventions of one checkpoint.

    `settings` come first. What they leave open follows the checkpoint's origin: openpi's have its
    joint signs, grippers and relative joints, LeRobot's the data set's own numbers. A description
    in a YAML file or a mapping is written for the checkpoint and applies as it stands.

    Raises:
        ValueError: unknown name, a bad description, another robot's checkpoint, or dimensions that
            do not fit.
    """
    if robot == GENERIC:
        made = _make_generic(config, settings)
    else:
        adapt = convention == "openpi" or not (isinstance(robot, str) and robot in NAMED)
        made = read_robot(robot).with_conventions(
            adapt if settings.adapt_to_pi is None else settings.adapt_to_pi,
            adapt if settings.delta_actions is None else settings.delta_actions,
            settings.dt_s,
        )
    if settings.robot not in (None, made.name):
        raise ValueError(
            f"the checkpoint is for robot {settings.robot!r} ({SETTINGS_FILE}), not {made.name!r}"
        )
    for what, mine, theirs, limit in (
        ("state_dim", made.state_dim, config.state_dim, config.max_state_dim),
        ("action_dim", made.action_dim, config.action_dim, config.max_action_dim),
    ):
        if mine > limit or theirs not in (None, mine):
            available = theirs or f"at most {limit}"
            raise ValueError(f"robot {made.name!r} has {what} {mine}, the checkpoint {available}")
    return made


def _make_generic(config: Dimensions, settings: Settings) -> Robot:
    """A robot with the units, dimensions and camera names of the checkpoint."""
    for key in ("adapt_to_pi", "delta_actions"):
        if getattr(settings, key):
            raise ValueError(f"{SETTINGS_FILE}: {key} is not for robot 'generic'")
    values = {
        "state_dim (config.json, input_features)": config.state_dim,
        "action_dim (config.json, output_features)": config.action_dim,
        f"dt_s ({SETTINGS_FILE})": settings.dt_s,
    }
    for key, value in values.items():
        if value is None:
            raise ValueError(f"robot 'generic' takes its {key} from the checkpoint: it is missing")
    state, action = (value_numbers(n or 0) for n in (config.state_dim, config.action_dim))
    return Robot(GENERIC, state, action, settings.dt_s or 0.0, {n: n for n in config.cameras})


def match_cameras(
    robot: Mapping[str, str], model: Sequence[str], rename: Mapping[str, str]
) -> dict[str, str]:
    """The robot's camera name → the checkpoint's, for the cameras that both have.

    For each of the robot's cameras the first of these that the checkpoint knows: what `rename`
    says, its own name, its usual name (`robot`). A renamed camera takes the place of one that has
    the same name in the checkpoint without being renamed. Cameras that only one side has are left
    out.

    Raises:
        ValueError: a name in `rename` is unknown, two cameras share one of the checkpoint's, or
            both sides have cameras left over, so that a name is probably spelt differently.
    """
    unknown = [name for name in rename.values() if name not in model]
    if unknown:
        raise ValueError(f"the checkpoint has no camera {unknown[0]!r}; it has {', '.join(model)}")
    if len(set(rename.values())) < len(rename):
        raise ValueError(f"two cameras are renamed to one of the checkpoint's: {dict(rename)}")
    matched = dict(rename)
    for name in robot:
        if name in rename:
            continue
        target = next((c for c in (name, robot[name]) if c in model), None)
        if target in rename.values():
            continue
        if target in matched.values():
            raise ValueError(f"two cameras are mapped to the checkpoint's {target!r}")
        if target is not None:
            matched[name] = target
    left_robot = [name for name in robot if name not in matched]
    left_model = [name for name in model if name not in matched.values()]
    if not matched or (left_robot and left_model):
        raise ValueError(
            f"no match for camera {', '.join(left_robot)} among the checkpoint's "
            f"{', '.join(left_model)}"
        )
    return matched


def apply_processor_settings(robot: Robot, processing: Processing, settings: Settings) -> Robot:
    """The robot with the relative actions and the prompt of the settings and LeRobot's files."""
    if processing.delta_mask is not None and settings.delta_actions is None:
        robot = replace(robot, delta_mask=processing.delta_mask)
    for value in (settings.state_in_prompt, processing.state_in_prompt, robot.state_in_prompt):
        if value is not None:
            return replace(robot, state_in_prompt=value)
    return replace(robot, state_in_prompt=True)


@dataclass(frozen=True)
class CheckpointBundle:
    """A checkpoint that fits a robot, by all of its files but the weights."""

    directory: Path
    config: PolicyConfig
    settings: Settings
    robot: Robot
    processing: Processing
    cameras: Mapping[str, str]
    """The robot's camera name → the network's."""

    def tokenizer(self) -> PromptTokenizer:
        """See `open_tokenizer`."""
        return open_tokenizer(self.directory, self.config, self.processing.tokenizer)


def open_tokenizer(directory: Path, config: PolicyConfig, name: str) -> PromptTokenizer:
    """The tokenizer in `tokenizer_folder`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = tokenizer_folder(directory, name)
    return PromptTokenizer.from_directory(folder, config.token_length, config.sizes.vocab)


def tokenizer_folder(directory: Path, name: str) -> Path:
    """A checkpoint's folder if it has a tokenizer, or the cached one of the Hugging Face id."""
    if (directory / TOKENIZER_FILE).is_file():
        return directory
    return cached_tokenizer(name) or directory


def open_checkpoint(path: str | Path, robot: RobotSource) -> CheckpointBundle:
    """Read all files but the weights.

    Raises:
        CheckpointError: not a usable checkpoint, or one that does not fit the robot.
    """
    directory = checkpoint_folder(path)
    config = read_config(directory)
    settings = Settings.read(directory)
    convention = convention_of(directory)
    try:
        made = make_robot(robot, config, convention, settings)
        processing = read_processing(directory, config, made.state_dim, made.action_dim)
        rename = {**processing.rename, **settings.cameras}
        cameras = match_cameras(made.cameras, config.cameras, rename)
        made = apply_processor_settings(made, processing, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return CheckpointBundle(directory, config, settings, made, processing, cameras)
