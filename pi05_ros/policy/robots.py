"""What a robot's numbers mean to a checkpoint: dimensions, cameras, joint signs, grippers, deltas.

Source: openpi `aloha_policy.py`, `transforms.py` (DeltaActions, AbsoluteActions) and
`training/config.py`. LeRobot has no joint flips or gripper maps. The robots themselves are in
`robot_description`.

A robot as a checkpoint sees it, in words: names, rate, cameras, signs, grippers, deltas.

Every field may stand in a YAML file or a mapping, so that a robot needs no code. The named ones
follow openpi `aloha_policy.py`, `droid_policy.py`, `libero_policy.py`, `examples/ur5` and
`training/config.py`; DROID's 0.2 rad a step is `relative_max_joint_delta` of DROID's controller.


How a gripper's opening relates to what a checkpoint calls it.

Source: openpi `aloha_policy.py`. Openings go from 0 (closed) to 1 (open). The base checkpoints have
the angle of ALOHA's gripper crank, in their own range.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.processing import Convention
from pi05_ros.policy.weights import CheckpointError, read_json
from pi05_ros.types import FloatArray

Transform = Callable[[FloatArray], FloatArray]

# The finger of a ViperX, in m, and its crank, in m and rad: 0 is closed.
_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.05800
_ARM, _HORN = 0.036, 0.022
# In rad: the base checkpoints' gripper range, and that of ALOHA's gripper joint.
_MODEL_CLOSED, _MODEL_OPEN = 0.5476, 1.6296
_COMMAND_CLOSED, _COMMAND_OPEN = -0.6213, 1.4910


def identity(values: FloatArray) -> FloatArray:
    """The values as they are."""
    return values


def gripper_to_angle(opening: FloatArray) -> FloatArray:
    """ALOHA's measured gripper, 0 closed to 1 open along the finger → the base checkpoints'."""
    finger = opening * (_FINGER_OPEN - _FINGER_CLOSED) + _FINGER_CLOSED
    cosine = (_HORN**2 + finger**2 - _ARM**2) / (2 * _HORN * finger)
    angle = np.arcsin(np.clip(cosine, -1, 1))
    return (angle - _MODEL_CLOSED) / (_MODEL_OPEN - _MODEL_CLOSED)


def gripper_to_finger(value: FloatArray) -> FloatArray:
    """Inverse of `gripper_to_angle`: the opening along the finger."""
    sine = np.sin(value * (_MODEL_OPEN - _MODEL_CLOSED) + _MODEL_CLOSED)
    finger = _HORN * sine + np.sqrt((_HORN * sine) ** 2 + _ARM**2 - _HORN**2)
    return (finger - _FINGER_CLOSED) / (_FINGER_OPEN - _FINGER_CLOSED)


def gripper_from_angle(value: FloatArray) -> FloatArray:
    """The base checkpoints' gripper action → ALOHA's command, 0 closed to 1 open.

    Not the inverse of `gripper_to_angle`: openpi scales the command by the gripper joint's range
    in rad, the measurement by the finger's in m.
    """
    return (value + _MODEL_CLOSED - _COMMAND_CLOSED) / (_COMMAND_OPEN - _COMMAND_CLOSED)


def gripper_from_angle_inverse(command: FloatArray) -> FloatArray:
    """ALOHA's gripper command → the base checkpoints' gripper action, for training."""
    return command * (_COMMAND_OPEN - _COMMAND_CLOSED) + _COMMAND_CLOSED - _MODEL_CLOSED


class GripperMap(NamedTuple):
    """One convention: measured opening → checkpoint, action → commanded opening, and back."""

    decode_state: Transform
    encode_action: Transform
    decode_action: Transform


GRIPPER_MAPS = {
    "linear": GripperMap(identity, identity, identity),
    "aloha_joint": GripperMap(gripper_to_angle, gripper_from_angle, gripper_from_angle_inverse),
    "aloha_finger": GripperMap(gripper_to_angle, gripper_to_finger, gripper_to_angle),
}
"""linear: the checkpoint has the opening itself. The others have the crank's angle there; the
commanded opening is the gripper joint's in `aloha_joint`, which is openpi's, and the finger's in
`aloha_finger`."""


ALOHA_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ALOHA_JOINTS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in ALOHA_ARM)
PANDA_JOINTS = tuple(f"panda_joint{n}" for n in range(1, 8))
UR_JOINTS = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)
SUFFIXES = (".yaml", ".yml")
MAX_FILE_BYTES = 2**20
MAX_ERROR_CHARS = 500


class DescriptionError(ValueError):
    """A robot description that cannot be used; the message names the key."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …")


@dataclass(frozen=True)
class RobotDescription:
    """What a checkpoint needs to know of a robot. Sequences follow `state` or `action`."""

    name: str
    state: tuple[str, ...]
    """Names of the state's values, in the checkpoint's order."""
    action: tuple[str, ...]
    """Names of the action's values, in the checkpoint's order."""
    dt_s: float
    """Time between two steps of a chunk."""
    cameras: Mapping[str, str] = field(default_factory=dict)
    """The robot's camera name → the checkpoint's."""
    rotated_cameras: tuple[str, ...] = ()
    """Cameras of the robot whose pictures the checkpoint knows turned by 180°."""
    signs: tuple[int, ...] = ()
    """1 or -1 per value, of state and action alike; empty: all 1."""
    grippers: tuple[str, ...] = ()
    """Which of the names are grippers."""
    gripper_range: tuple[float, float] = (0.0, 1.0)
    """The robot's values for the openings 0 (closed) and 1 (open), which `gripper_map` takes."""
    gripper_map: str = "linear"
    """What the checkpoint calls an opening, see `grippers.GRIPPER_MAPS`."""
    binary_grippers: bool = False
    """Gripper actions above 0.5 become 1, others 0."""
    delta_mask: tuple[bool, ...] = ()
    """Which actions are relative to the state at the chunk's start; empty: none."""
    velocity_step: float = 0.0
    """Above 0: actions other than grippers are velocities in [-1, 1], and 1 moves that far a step.
    The chunk that comes out has positions."""
    state_in_prompt: bool | None = None
    """Whether π0.5's prompt has the state; None leaves it to the checkpoint."""

    def __post_init__(self) -> None:
        if not self.state or not self.action:
            raise DescriptionError(f"robot {self.name!r}: state and action must be lists of names")
        if not math.isfinite(self.dt_s) or self.dt_s <= 0:
            raise DescriptionError(f"robot {self.name!r}: dt_s must be above 0, not {self.dt_s}")
        self._check_lists()
        if self.gripper_map not in GRIPPER_MAPS:
            raise DescriptionError(
                f"robot {self.name!r}: gripper_map {self.gripper_map!r} is unknown; known: "
                f"{', '.join(GRIPPER_MAPS)}"
            )
        if self.gripper_range[0] == self.gripper_range[1]:
            raise DescriptionError(
                f"robot {self.name!r}: gripper_range needs two different values, not "
                f"{list(self.gripper_range)}"
            )
        if self.velocity_step < 0 or (self.velocity_step and any(self.delta_mask)):
            raise DescriptionError(
                f"robot {self.name!r}: velocity_step must be 0 or above and excludes delta_mask"
            )

    def _check_lists(self) -> None:
        for key in ("state", "action"):
            names = getattr(self, key)
            if len(set(names)) != len(names):
                raise DescriptionError(f"robot {self.name!r}: {key} has a name twice")
        known = {*self.state, *self.action}
        for name in self.grippers:
            if name not in known:
                raise DescriptionError(
                    f"robot {self.name!r}: gripper {name!r} is neither in state nor in action"
                )
        for name in self.rotated_cameras:
            if name not in self.cameras:
                raise DescriptionError(f"robot {self.name!r}: rotated camera {name!r} is no camera")
        dims = {len(self.state), len(self.action)}
        if self.signs and (dims != {len(self.signs)} or not {1, -1} >= set(self.signs)):
            raise DescriptionError(
                f"robot {self.name!r}: signs must be 1 or -1 for each of {sorted(dims)} values, "
                f"not {list(self.signs)}"
            )
        if self.delta_mask and len(self.delta_mask) != len(self.action):
            raise DescriptionError(
                f"robot {self.name!r}: delta_mask has {len(self.delta_mask)} values for "
                f"{len(self.action)} actions"
            )
        relative = [i for i, flag in enumerate(self.delta_mask) if flag]
        if relative and relative[-1] >= len(self.state):
            raise DescriptionError(
                f"robot {self.name!r}: delta_mask makes action {relative[-1]} relative to a state "
                f"of {len(self.state)} values"
            )

    def to_mapping(self) -> dict[str, Any]:
        """All fields in YAML's types; `parse_description` reads it back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


NAMED = {
    "aloha": RobotDescription(
        name="aloha",
        state=ALOHA_JOINTS,
        action=ALOHA_JOINTS,
        dt_s=0.02,
        cameras={
            "cam_high": "base_0_rgb",
            "cam_left_wrist": "left_wrist_0_rgb",
            "cam_right_wrist": "right_wrist_0_rgb",
        },
        # The base checkpoints' shoulder and elbow turn the other way round than ALOHA's.
        signs=(1, -1, -1, 1, 1, 1, 1) * 2,
        grippers=("left_gripper", "right_gripper"),
        gripper_map="aloha_joint",
        delta_mask=(*[True] * 6, False) * 2,
    ),
    "droid": RobotDescription(
        name="droid",
        state=(*PANDA_JOINTS, "gripper"),
        action=(*PANDA_JOINTS, "gripper"),
        dt_s=1 / 15,
        cameras={
            "exterior_image_1_left": "base_0_rgb",
            "wrist_image_left": "left_wrist_0_rgb",
        },
        grippers=("gripper",),
        # The data's gripper is 0 open and 1 closed, and so is the robot's.
        binary_grippers=True,
        velocity_step=0.2,
    ),
    "libero": RobotDescription(
        name="libero",
        # the hand's place in m, its turn as an axis times an angle in rad, the two fingers in m
        state=("x", "y", "z", "turn_x", "turn_y", "turn_z", "finger_1", "finger_2"),
        action=("dx", "dy", "dz", "turn_dx", "turn_dy", "turn_dz", "gripper"),
        dt_s=0.05,
        cameras={"image": "base_0_rgb", "wrist_image": "left_wrist_0_rgb"},
        rotated_cameras=("image", "wrist_image"),
        state_in_prompt=False,
    ),
    "ur5e": RobotDescription(
        name="ur5e",
        state=(*UR_JOINTS, "gripper"),
        action=(*UR_JOINTS, "gripper"),
        dt_s=0.05,
        cameras={"base_rgb": "base_0_rgb", "wrist_rgb": "left_wrist_0_rgb"},
        grippers=("gripper",),
        delta_mask=(*[True] * 6, False),
    ),
}  # fmt: skip


def read_description(source: str | Path | Mapping[str, Any]) -> RobotDescription:
    """A robot's description by its name, from a YAML file, or from a mapping.

    Raises:
        DescriptionError: an unknown name, an unreadable file, an unknown key or a bad value.
    """
    if isinstance(source, Mapping):
        return parse_description(source)
    if isinstance(source, str) and source in NAMED:
        return NAMED[source]
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        known = ", ".join([*NAMED, "generic"])
        raise DescriptionError(
            f"unknown robot {str(source)!r}; known: {known}, or the path of a YAML description"
        )
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise DescriptionError(f"{path} must hold keys and values")
    try:
        return parse_description(document)
    except DescriptionError as error:
        raise DescriptionError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> Any:
    # of use to those alone who bring a file
    import yaml

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DescriptionError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except DescriptionError:
        raise
    except OSError as error:
        raise DescriptionError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        # beside YAMLError what int(), dates and bases raise for bad values, and RecursionError
        raise DescriptionError(f"{path} is not YAML: {error or type(error).__name__}") from None


def parse_description(document: Mapping[str, Any]) -> RobotDescription:
    """A description from plain values; `base` names one to begin with.

    Raises:
        DescriptionError: an unknown or missing key, or a value of the wrong type.
    """
    values = dict(document)
    base = values.pop("base", None)
    if base is not None and not (isinstance(base, str) and base in NAMED):
        raise DescriptionError(f"base {_shown(base)} is unknown; known: {', '.join(NAMED)}")
    known = {f.name for f in fields(RobotDescription)}
    for key in values:
        if key not in known:
            raise DescriptionError(f"unknown key {key!r}; known: base, {', '.join(sorted(known))}")
    parsed = {key: _value(key, value) for key, value in values.items()}
    if base is not None:
        return replace(NAMED[base], **parsed)
    for key in ("name", "state", "action", "dt_s"):
        if key not in parsed:
            raise DescriptionError(f"{key} is missing")
    return RobotDescription(**parsed)


def _value(key: str, value: Any) -> Any:
    if _fits(key, value):
        return tuple(value) if isinstance(value, list) else value
    raise DescriptionError(f"{key} must not be {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for an error: YAML's aliases make few lines into a text of gigabytes."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)


def _fits(key: str, value: Any) -> bool:
    if key in ("name", "gripper_map"):
        return isinstance(value, str)
    if key in ("dt_s", "velocity_step"):
        return _number(value)
    if key == "binary_grippers":
        return isinstance(value, bool)
    if key == "state_in_prompt":
        return value is None or isinstance(value, bool)
    if key == "cameras":
        return isinstance(value, dict) and all(
            isinstance(name, str) for pair in value.items() for name in pair
        )
    if not isinstance(value, (list, tuple)):
        return False
    if key == "delta_mask":
        return all(isinstance(item, bool) for item in value)
    if key in ("signs", "gripper_range"):
        return all(_number(item) for item in value) and (key == "signs" or len(value) == 2)
    return all(isinstance(item, str) for item in value)


def _number(value: Any) -> bool:
    """Whole numbers beyond 2⁵³ are refused: NumPy would take them for objects."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float) and math.isfinite(value)


ALOHA_SIGNS = np.array(NAMED["aloha"].signs, dtype=np.float64)
ALOHA_DELTA_MASK = NAMED["aloha"].delta_mask


@dataclass(frozen=True)
class Robot:
    """How one robot's joints and cameras are presented to a checkpoint.

    Arrays are [..., state_dim] or [..., action_dim] in the robot's joint order.
    """

    name: str
    state_dim: int
    action_dim: int
    dt_s: float
    """Time between two steps of a chunk."""
    cameras: Mapping[str, str]
    """The robot's camera name → the checkpoint's."""
    delta_mask: tuple[bool, ...] | None = None
    """Which of the action's dimensions are relative to the state; None: all are absolute."""
    decode_state: Transform = field(default=identity, repr=False)
    """Robot state → the checkpoint's units."""
    encode_action: Transform = field(default=identity, repr=False)
    """The checkpoint's absolute actions → robot units."""
    decode_action: Transform = field(default=identity, repr=False)
    """Inverse of `encode_action`, for training."""
    velocity_mask: tuple[bool, ...] | None = None
    """Which of the action's dimensions are velocities in [-1, 1]; None: none."""
    velocity_step: float = 0.0
    """How far velocity 1 moves in a step, in the checkpoint's units."""
    rotated_cameras: frozenset[str] = frozenset()
    """Cameras whose pictures the checkpoint knows turned by 180°."""
    state_in_prompt: bool | None = None
    """Whether π0.5's prompt has the state; None leaves it to the checkpoint."""
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dt_s <= 0 or not np.isfinite(self.dt_s):
            raise ValueError(f"robot {self.name!r}: dt_s must be above 0, not {self.dt_s}")
        if self.delta_mask is not None and len(self.delta_mask) > self.action_dim:
            raise ValueError(
                f"robot {self.name!r}: delta_mask has {len(self.delta_mask)} values for "
                f"{self.action_dim} actions"
            )

    def to_absolute(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """[horizon, action_dim] as predicted → absolute, both in the checkpoint's units.

        Every step is relative to the one state [state_dim] of the observation, not to the step
        before it. Velocities are cut to [-1, 1] and add up from that state on.
        """
        absolute = actions + self._reference(state)
        if self.velocity_mask is not None:
            dims = np.flatnonzero(self.velocity_mask)
            moved = np.clip(actions[:, dims], -1, 1).cumsum(0) * self.velocity_step
            absolute[:, dims] = state[dims] + moved
        return absolute

    def to_delta(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """Inverse of `to_absolute`, for training."""
        delta = actions - self._reference(state)
        if self.velocity_mask is not None:
            dims = np.flatnonzero(self.velocity_mask)
            positions = np.concatenate((state[None, dims], actions[:, dims]))
            delta[:, dims] = np.diff(positions, axis=0) / self.velocity_step
        return delta

    def _reference(self, state: FloatArray) -> FloatArray:
        reference = np.zeros(self.action_dim)
        if self.delta_mask is not None:
            dims = np.flatnonzero(self.delta_mask)
            reference[dims] = state[dims]
        return reference


def build_robot(
    description: RobotDescription,
    adapt_units: bool = True,
    delta_actions: bool = True,
    dt_s: float | None = None,
) -> Robot:
    """The robot of a description.

    Args:
        description: see `robot_description`.
        adapt_units: heed its signs and grippers; else the checkpoint has the robot's numbers.
        delta_actions: heed its delta_mask.
        dt_s: instead of the description's, where the data was recorded at another rate.
    """
    velocities = None
    if description.velocity_step:
        velocities = tuple(name not in description.grippers for name in description.action)
    robot = Robot(
        name=description.name,
        state_dim=len(description.state),
        action_dim=len(description.action),
        dt_s=description.dt_s if dt_s is None else dt_s,
        cameras=dict(description.cameras),
        delta_mask=description.delta_mask or None if delta_actions else None,
        velocity_mask=velocities,
        velocity_step=description.velocity_step,
        rotated_cameras=frozenset(description.rotated_cameras),
        state_in_prompt=description.state_in_prompt,
        state_names=description.state,
        action_names=description.action,
    )
    if not adapt_units:
        return robot
    maps = GRIPPER_MAPS[description.gripper_map]
    return replace(
        robot,
        decode_state=_inward(description, description.state, maps.decode_state),
        encode_action=_outward(description, maps.encode_action),
        decode_action=_inward(description, description.action, maps.decode_action),
    )


def _inward(description: RobotDescription, names: tuple[str, ...], gripper: Transform) -> Transform:
    """Robot units → the checkpoint's."""
    signs, dims = _signs(description, names), _gripper_dims(description, names)
    closed, opened = description.gripper_range

    def transform(values: FloatArray) -> FloatArray:
        values = signs * values
        values[..., dims] = gripper((values[..., dims] - closed) / (opened - closed))
        return values

    return transform


def _outward(description: RobotDescription, gripper: Transform) -> Transform:
    """The checkpoint's absolute actions → robot units."""
    names = description.action
    signs, dims = _signs(description, names), _gripper_dims(description, names)
    closed, opened = description.gripper_range

    def transform(values: FloatArray) -> FloatArray:
        values = signs * values
        opening = gripper(values[..., dims])
        if description.binary_grippers:
            opening = (opening > 0.5).astype(np.float64)
        values[..., dims] = closed + opening * (opened - closed)
        return values

    return transform


def _signs(description: RobotDescription, names: tuple[str, ...]) -> FloatArray:
    return np.array(description.signs or [1] * len(names), dtype=np.float64)


def _gripper_dims(description: RobotDescription, names: tuple[str, ...]) -> list[int]:
    return [i for i, name in enumerate(names) if name in description.grippers]


def aloha(adapt_to_pi: bool = True, delta_actions: bool = True, dt_s: float = 0.02) -> Robot:
    """Two ViperX arms: left 6 joints in rad, left gripper 0-1, then the same on the right.

    Args:
        adapt_to_pi: turn joint signs and grippers into those of openpi's base checkpoints.
        delta_actions: the checkpoint's joint actions are relative to the state, grippers absolute.
        dt_s: 50 Hz unless the data was recorded at another rate.
    """
    return build_robot(NAMED["aloha"], adapt_to_pi, delta_actions, dt_s)


def generic(state_dim: int, action_dim: int, cameras: Sequence[str], dt_s: float) -> Robot:
    """A robot whose units and camera names are those that the checkpoint was trained with."""
    return Robot(
        name="generic",
        state_dim=state_dim,
        action_dim=action_dim,
        dt_s=dt_s,
        cameras={name: name for name in cameras},
    )


GENERIC = "generic"
ROBOTS = (*NAMED, GENERIC)
SETTINGS_FILE = "pi05_ros.json"


@dataclass(frozen=True)
class Settings:
    """A checkpoint folder's pi05_ros.json: what its own files cannot say. Every key is optional."""

    robot: str | None = None
    adapt_to_pi: bool | None = None
    delta_actions: bool | None = None
    dt_s: float | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    """The robot's camera name → the checkpoint's, where the names differ from the usual ones."""
    state_in_prompt: bool | None = None
    """Whether π0.5's prompt has the state; openpi's pi05_libero leaves it out."""
    trained: bool | None = None
    note: str = ""
    """For a person, such as "random weights, seed 0"."""

    @classmethod
    def read(cls, directory: Path) -> Settings:
        """Read the folder's pi05_ros.json; without one, every setting is left open.

        Raises:
            CheckpointError: not JSON, an unknown key, or a value of the wrong type.
        """
        path = directory / SETTINGS_FILE
        if not path.is_file():
            return cls()
        document = read_json(path)
        known = {f.name for f in fields(cls)}
        for key, value in document.items():
            if key not in known:
                raise CheckpointError(f"{path}: unknown key {key!r}; known: {sorted(known)}")
            if not _right_type(key, value):
                raise CheckpointError(f"{path}: {key} must not be {value!r}")
        return cls(**document)


def _right_type(key: str, value: Any) -> bool:
    if key == "cameras":
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if key == "note":
        return isinstance(value, str)
    if value is None:
        return True
    if key == "dt_s":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 10
    return isinstance(value, str if key == "robot" else bool)


def make_robot(
    robot: str | Path | Mapping[str, Any],
    config: PolicyConfig,
    convention: Convention,
    settings: Settings,
) -> Robot:
    """A robot with the conventions of one checkpoint.

    `settings` decide. What they leave open follows the checkpoint's origin: openpi's expect its
    joint signs, grippers and relative joints, LeRobot's the data set's own numbers. A description
    of one's own (`robot` is a YAML file or a mapping) is for the checkpoint at hand and holds.

    Raises:
        ValueError: unknown name, a bad description, another robot's checkpoint, or dimensions that
            do not fit.
    """
    if robot == GENERIC:
        body = _generic_from(config, settings)
    else:
        description = read_description(robot)
        adapt = convention == "openpi" or not (isinstance(robot, str) and robot in NAMED)
        body = build_robot(
            description,
            adapt if settings.adapt_to_pi is None else settings.adapt_to_pi,
            adapt if settings.delta_actions is None else settings.delta_actions,
            settings.dt_s,
        )
    name = body.name
    if settings.robot not in (None, name):
        raise ValueError(
            f"the checkpoint is for robot {settings.robot!r} ({SETTINGS_FILE}), not {name!r}"
        )
    for what, mine, theirs, limit in (
        ("state_dim", body.state_dim, config.state_dim, config.max_state_dim),
        ("action_dim", body.action_dim, config.action_dim, config.max_action_dim),
    ):
        if mine > limit or (theirs is not None and theirs != mine):
            raise ValueError(
                f"robot {name!r} has {what} {mine}, the checkpoint {theirs or f'at most {limit}'}"
            )
    return body


def _generic_from(config: PolicyConfig, settings: Settings) -> Robot:
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
    assert config.state_dim and config.action_dim and settings.dt_s
    return generic(config.state_dim, config.action_dim, config.cameras, settings.dt_s)


def match_cameras(
    robot: Mapping[str, str], model: Sequence[str], rename: Mapping[str, str]
) -> dict[str, str]:
    """The robot's camera name → the checkpoint's, for the cameras that both have.

    For each of the robot's cameras the first of these that the checkpoint knows: what `rename`
    says, its own name, its usual name (`robot`). Cameras that only one side has are left out.

    Raises:
        ValueError: a name in `rename` is unknown, two cameras share one of the checkpoint's, or
            both sides have cameras left over, so that a name is probably spelt differently.
    """
    unknown = [name for name in rename.values() if name not in model]
    if unknown:
        raise ValueError(f"the checkpoint has no camera {unknown[0]!r}; it has {', '.join(model)}")
    matched: dict[str, str] = {}
    for name in [*robot, *(name for name in rename if name not in robot)]:
        candidates = (rename.get(name), name, robot.get(name))
        target = next((c for c in candidates if c in model), None)
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
