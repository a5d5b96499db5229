"""A robot as a checkpoint sees it: dimensions, cameras, joint signs, grippers, relative actions.

Every key of a `Robot` may stand in a YAML file or a mapping, so a new robot needs no code. The
built-in ones follow openpi `aloha_policy.py`, `droid_policy.py`, `libero_policy.py`,
`examples/ur5`, `transforms.py` (DeltaActions, AbsoluteActions) and `training/config.py`; DROID's
0.2 rad per step is `relative_max_joint_delta` of DROID's controller. LeRobot has no joint flips or
gripper maps.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pi05_ros.policy.weights import CheckpointError, read_regular_file
from pi05_ros.types import FloatArray

Transform = Callable[[FloatArray], FloatArray]

# Finger positions of a ViperX in m, and its crank's arm and horn in m.
_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.05800
_ARM, _HORN = 0.036, 0.022
# The base checkpoints' gripper range and that of ALOHA's gripper joint, in rad.
_MODEL_CLOSED, _MODEL_OPEN = 0.5476, 1.6296
_COMMAND_CLOSED, _COMMAND_OPEN = -0.6213, 1.4910


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
    """Conversions of a gripper's opening, 0 (closed) to 1 (open)."""

    decode_state: Transform
    """Measured opening → the checkpoint's value."""
    encode_action: Transform
    """The checkpoint's value → commanded opening."""
    decode_action: Transform
    """Inverse of `encode_action`."""


GRIPPER_MAPS = {
    "linear": GripperMap(np.asarray, np.asarray, np.asarray),
    "aloha_joint": GripperMap(gripper_to_angle, gripper_from_angle, gripper_from_angle_inverse),
    "aloha_finger": GripperMap(gripper_to_angle, gripper_to_finger, gripper_to_angle),
}
"""linear: the checkpoint has the opening itself. In the others it has the crank's angle; the
commanded opening is the gripper joint's in `aloha_joint`, as in openpi, and the finger's in
`aloha_finger`."""

MAX_FILE_BYTES = 2**20
MAX_ERROR_CHARS = 500


class DescriptionError(ValueError):
    """An unusable robot description; the message names the key."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …")


@dataclass(frozen=True)
class Robot:
    """What a robot's numbers mean to a checkpoint. The fields are the keys of a YAML description.

    Arrays are [..., state_dim] in the order of `state` or [..., action_dim] in that of `action`.
    """

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
    """The robot's cameras whose images are rotated by 180° for the checkpoint."""
    signs: tuple[int, ...] = ()
    """1 or -1 per value, of state and action alike; empty: all 1."""
    grippers: tuple[str, ...] = ()
    """Which of the names are grippers."""
    gripper_range: tuple[float, float] = (0.0, 1.0)
    """The robot's values for the openings 0 (closed) and 1 (open) of `gripper_map`."""
    gripper_map: str = "linear"
    """A key of `GRIPPER_MAPS`."""
    binary_grippers: bool = False
    """Gripper actions above 0.5 become 1, others 0."""
    delta_mask: tuple[bool, ...] = ()
    """Which actions are relative to the state at the chunk's start; empty: none."""
    velocity_step: float = 0.0
    """Above 0: actions other than grippers are velocities in [-1, 1], and velocity 1 moves this far
    per step. `to_absolute` turns them into positions."""
    state_in_prompt: bool | None = None
    """Whether π0.5's prompt has the state; None: as the checkpoint says."""

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise DescriptionError(f"robot {self.name!r}: {fault}")

    def _fault(self) -> str | None:
        if not self.state or not self.action:
            return "state and action must be lists of names"
        if not math.isfinite(self.dt_s) or self.dt_s <= 0:
            return f"dt_s must be above 0, not {self.dt_s}"
        for key, names in (("state", self.state), ("action", self.action)):
            if len(set(names)) != len(names):
                return f"{key} has a name twice"
        for name in self.grippers:
            if name not in (*self.state, *self.action):
                return f"gripper {name!r} is neither in state nor in action"
        for name in self.rotated_cameras:
            if name not in self.cameras:
                return f"rotated camera {name!r} is no camera"
        dims = {self.state_dim, self.action_dim}
        if self.signs and (dims != {len(self.signs)} or not {1, -1} >= set(self.signs)):
            signs = list(self.signs)
            return f"signs must be 1 or -1 for each of {sorted(dims)} values, not {signs}"
        if self.delta_mask and len(self.delta_mask) != self.action_dim:
            return f"delta_mask has {len(self.delta_mask)} values for {self.action_dim} actions"
        for dim in np.flatnonzero(self.delta_mask[self.state_dim :]) + self.state_dim:
            return f"delta_mask makes action {dim} relative to a state of {self.state_dim} values"
        if self.gripper_map not in GRIPPER_MAPS:
            known = ", ".join(GRIPPER_MAPS)
            return f"gripper_map {self.gripper_map!r} is unknown; known: {known}"
        if len(self.gripper_range) != 2 or self.gripper_range[0] == self.gripper_range[1]:
            return f"gripper_range needs two different values, not {list(self.gripper_range)}"
        if self.velocity_step < 0 or (self.velocity_step and any(self.delta_mask)):
            return "velocity_step must be 0 or above and excludes delta_mask"
        return None

    @property
    def state_dim(self) -> int:
        return len(self.state)

    @property
    def action_dim(self) -> int:
        return len(self.action)

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the action's values; empty for the generic robot, which numbers them."""
        return () if self.action == value_numbers(self.action_dim) else self.action

    def decode_state(self, state: FloatArray) -> FloatArray:
        """Robot state → the checkpoint's units."""
        return self._decode(state, self.state, GRIPPER_MAPS[self.gripper_map].decode_state)

    def decode_action(self, actions: FloatArray) -> FloatArray:
        """Inverse of `encode_action`, for training and guidance."""
        return self._decode(actions, self.action, GRIPPER_MAPS[self.gripper_map].decode_action)

    def encode_action(self, actions: FloatArray) -> FloatArray:
        """The checkpoint's absolute actions → robot units."""
        values = self._flip(actions)
        dims, (closed, opened) = self._gripper_dims(self.action), self.gripper_range
        opening = GRIPPER_MAPS[self.gripper_map].encode_action(values[..., dims])
        if self.binary_grippers:
            opening = (opening > 0.5).astype(np.float64)
        values[..., dims] = closed + opening * (opened - closed)
        return values

    def to_absolute(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """[horizon, action_dim] as predicted → absolute, both in the checkpoint's units.

        Every step is relative to the one state [state_dim] of the observation, not to the step
        before it. Velocities are clipped to [-1, 1] and summed up from that state.
        """
        absolute = actions + self._reference(state)
        if self.velocity_step:
            dims = self._velocity_dims()
            moved = np.clip(actions[:, dims], -1, 1).cumsum(0) * self.velocity_step
            absolute[:, dims] = state[dims] + moved
        return absolute

    def to_delta(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """Inverse of `to_absolute`, for training and guidance."""
        delta = actions - self._reference(state)
        if self.velocity_step:
            dims = self._velocity_dims()
            positions = np.concatenate((state[None, dims], actions[:, dims]))
            delta[:, dims] = np.diff(positions, axis=0) / self.velocity_step
        return delta

    def with_conventions(
        self, adapt_units: bool = True, delta_actions: bool = True, dt_s: float | None = None
    ) -> Robot:
        """The same robot for a checkpoint of other conventions.

        Args:
            adapt_units: False: the checkpoint has the robot's signs and gripper values.
            delta_actions: False: the checkpoint's actions are absolute.
            dt_s: replaces the robot's, for data recorded at another rate.
        """
        changes: dict[str, Any] = {}
        if not adapt_units:
            changes.update(
                signs=(), gripper_range=(0.0, 1.0), gripper_map="linear", binary_grippers=False
            )
        if not delta_actions:
            changes["delta_mask"] = ()
        return replace(self, dt_s=self.dt_s if dt_s is None else dt_s, **changes)

    def _decode(self, values: FloatArray, names: tuple[str, ...], gripper: Transform) -> FloatArray:
        values = self._flip(values)
        dims, (closed, opened) = self._gripper_dims(names), self.gripper_range
        values[..., dims] = gripper((values[..., dims] - closed) / (opened - closed))
        return values

    def _flip(self, values: FloatArray) -> FloatArray:
        return values * np.array(self.signs or 1, dtype=np.float64)

    def _gripper_dims(self, names: tuple[str, ...]) -> list[int]:
        return [i for i, name in enumerate(names) if name in self.grippers]

    def _velocity_dims(self) -> list[int]:
        return [i for i, name in enumerate(self.action) if name not in self.grippers]

    def _reference(self, state: FloatArray) -> FloatArray:
        reference = np.zeros(self.action_dim)
        dims = np.flatnonzero(self.delta_mask)
        reference[dims] = state[dims]
        return reference


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
GENERIC = "generic"

NAMED = {
    "aloha": Robot(
        name="aloha",
        state=ALOHA_JOINTS,
        action=ALOHA_JOINTS,
        dt_s=0.02,
        cameras={
            "cam_high": "base_0_rgb",
            "cam_left_wrist": "left_wrist_0_rgb",
            "cam_right_wrist": "right_wrist_0_rgb",
        },
        # The base checkpoints' shoulder and elbow turn opposite to ALOHA's.
        signs=(1, -1, -1, 1, 1, 1, 1) * 2,
        grippers=("left_gripper", "right_gripper"),
        gripper_map="aloha_joint",
        delta_mask=(*[True] * 6, False) * 2,
    ),
    "droid": Robot(
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
    "libero": Robot(
        name="libero",
        # hand position in m, rotation vector in rad, the two fingers in m
        state=("x", "y", "z", "turn_x", "turn_y", "turn_z", "finger_1", "finger_2"),
        action=("dx", "dy", "dz", "turn_dx", "turn_dy", "turn_dz", "gripper"),
        dt_s=0.05,
        cameras={"image": "base_0_rgb", "wrist_image": "left_wrist_0_rgb"},
        rotated_cameras=("image", "wrist_image"),
        state_in_prompt=False,
    ),
    "ur5e": Robot(
        name="ur5e",
        state=(*UR_JOINTS, "gripper"),
        action=(*UR_JOINTS, "gripper"),
        dt_s=0.05,
        cameras={"base_rgb": "base_0_rgb", "wrist_rgb": "left_wrist_0_rgb"},
        grippers=("gripper",),
        delta_mask=(*[True] * 6, False),
    ),
}  # fmt: skip


RobotSource = str | Path | Mapping[str, Any]
"""A robot's name, the path of its YAML description, or a mapping of the same keys."""


def read_robot(source: RobotSource) -> Robot:
    """A robot by its name, from a YAML file, or from a mapping; `base` names one to begin with.

    Raises:
        DescriptionError: an unknown name, an unreadable file, an unknown or missing key, or a bad
            value.
    """
    if isinstance(source, Mapping):
        return _parse(source)
    if isinstance(source, str) and source in NAMED:
        return NAMED[source]
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        known = ", ".join([*NAMED, GENERIC])
        raise DescriptionError(
            f"unknown robot {str(source)!r}; known: {known}, or the path of a YAML description"
        )
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise DescriptionError(f"{path} must hold keys and values")
    try:
        return _parse(document)
    except DescriptionError as error:
        raise DescriptionError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> Any:
    import yaml  # only a description in a file needs it

    try:
        return yaml.safe_load(read_regular_file(path, MAX_FILE_BYTES))
    except CheckpointError as error:
        raise DescriptionError(str(error)) from None
    except OSError as error:
        raise DescriptionError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        # Beside YAMLError, constructors of numbers and dates raise others; deep nesting too.
        raise DescriptionError(f"{path} is not YAML: {error or type(error).__name__}") from None


def _parse(document: Mapping[str, Any]) -> Robot:
    values = dict(document)
    base = values.pop("base", None)
    if base is not None and not (isinstance(base, str) and base in NAMED):
        raise DescriptionError(f"base {_shown(base)} is unknown; known: {', '.join(NAMED)}")
    known = {f.name: str(f.type) for f in fields(Robot)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key)[:80], ["base", *known], 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            names = ", ".join(sorted(known))
            raise DescriptionError(f"unknown key {_shown(key)}: {hint}known: base, {names}")
        if not has_type(known[key], value):
            raise DescriptionError(f"{key} must not be {_shown(value)}")
        values[key] = tuple(value) if isinstance(value, list) else value
    if base is not None:
        return replace(NAMED[base], **values)
    for key in ("name", "state", "action", "dt_s"):
        if key not in values:
            raise DescriptionError(f"{key} is missing")
    return Robot(**values)


def _shown(value: Any) -> str:
    """A value for an error, cut: with YAML's aliases few lines hold gigabytes of text."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)


def has_type(annotation: str, value: Any) -> bool:
    """Whether a value from a file has the type of a field's annotation."""
    if annotation.endswith(" | None"):
        return value is None or has_type(annotation.removesuffix(" | None"), value)
    if annotation.startswith("Mapping"):
        return isinstance(value, dict) and all(
            isinstance(text, str) for pair in value.items() for text in pair
        )
    if annotation.startswith("tuple"):
        item = annotation.removeprefix("tuple[").partition(",")[0]
        return isinstance(value, (list, tuple)) and all(
            has_type(item, element) for element in value
        )
    if annotation in ("int", "float"):
        # NumPy would store integers beyond 2⁵³ as objects.
        number = isinstance(value, int) and abs(value) <= 2**53 and not isinstance(value, bool)
        return number or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, {"str": str, "bool": bool}[annotation])


def value_numbers(count: int) -> tuple[str, ...]:
    """Names of the generic robot's values."""
    return tuple(map(str, range(count)))
