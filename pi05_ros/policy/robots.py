"""What a robot's numbers mean to a checkpoint: dimensions, cameras, joint signs, grippers, deltas.

Source: openpi `aloha_policy.py`, `transforms.py` (DeltaActions, AbsoluteActions) and
`training/config.py`. LeRobot has no joint flips or gripper maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.normalize import Convention
from pi05_ros.policy.weights import CheckpointError, read_json
from pi05_ros.types import FloatArray

Transform = Callable[[FloatArray], FloatArray]

ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, dtype=np.float64)
"""The base checkpoints' shoulder and elbow turn the other way round than ALOHA's."""
ALOHA_GRIPPERS = (6, 13)
ALOHA_DELTA_MASK = (*[True] * 6, False, *[True] * 6, False)
ALOHA_CAMERAS = {
    "cam_high": "base_0_rgb",
    "cam_left_wrist": "left_wrist_0_rgb",
    "cam_right_wrist": "right_wrist_0_rgb",
}

# The finger of a ViperX, in m, and its crank, in m and rad: 0 is closed.
_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.05800
_ARM, _HORN = 0.036, 0.022
# In rad: the base checkpoints' gripper range, and that of ALOHA's gripper joint.
_MODEL_CLOSED, _MODEL_OPEN = 0.5476, 1.6296
_COMMAND_CLOSED, _COMMAND_OPEN = -0.6213, 1.4910


def _identity(values: FloatArray) -> FloatArray:
    return values


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
    decode_state: Transform = field(default=_identity, repr=False)
    """Robot state → the checkpoint's units."""
    encode_action: Transform = field(default=_identity, repr=False)
    """The checkpoint's absolute actions → robot units."""
    decode_action: Transform = field(default=_identity, repr=False)
    """Inverse of `encode_action`, for training."""

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
        before it.
        """
        return actions + self._reference(state)

    def to_delta(self, actions: FloatArray, state: FloatArray) -> FloatArray:
        """Inverse of `to_absolute`, for training."""
        return actions - self._reference(state)

    def _reference(self, state: FloatArray) -> FloatArray:
        reference = np.zeros(self.action_dim)
        if self.delta_mask is not None:
            dims = np.flatnonzero(self.delta_mask)
            reference[dims] = state[dims]
        return reference


def gripper_to_angle(opening: FloatArray) -> FloatArray:
    """ALOHA's measured gripper, 0 closed to 1 open along the finger → the base checkpoints'."""
    finger = opening * (_FINGER_OPEN - _FINGER_CLOSED) + _FINGER_CLOSED
    cosine = (_HORN**2 + finger**2 - _ARM**2) / (2 * _HORN * finger)
    angle = np.arcsin(np.clip(cosine, -1, 1))
    return (angle - _MODEL_CLOSED) / (_MODEL_OPEN - _MODEL_CLOSED)


def gripper_from_angle(value: FloatArray) -> FloatArray:
    """The base checkpoints' gripper action → ALOHA's command, 0 closed to 1 open.

    Not the inverse of `gripper_to_angle`: openpi scales the command by the gripper joint's range
    in rad, the measurement by the finger's in m.
    """
    return (value + _MODEL_CLOSED - _COMMAND_CLOSED) / (_COMMAND_OPEN - _COMMAND_CLOSED)


def gripper_from_angle_inverse(command: FloatArray) -> FloatArray:
    """ALOHA's gripper command → the base checkpoints' gripper action, for training."""
    return command * (_COMMAND_OPEN - _COMMAND_CLOSED) + _COMMAND_CLOSED - _MODEL_CLOSED


def _aloha_transform(gripper: Transform) -> Transform:
    def transform(values: FloatArray) -> FloatArray:
        values = ALOHA_SIGNS * values
        dims = list(ALOHA_GRIPPERS)
        values[..., dims] = gripper(values[..., dims])
        return values

    return transform


def aloha(adapt_to_pi: bool = True, delta_actions: bool = True, dt_s: float = 0.02) -> Robot:
    """Two ViperX arms: left 6 joints in rad, left gripper 0-1, then the same on the right.

    Args:
        adapt_to_pi: turn joint signs and grippers into those of openpi's base checkpoints.
        delta_actions: the checkpoint's joint actions are relative to the state, grippers absolute.
        dt_s: 50 Hz unless the data was recorded at another rate.
    """
    robot = Robot(
        name="aloha",
        state_dim=14,
        action_dim=14,
        dt_s=dt_s,
        cameras=dict(ALOHA_CAMERAS),
        delta_mask=ALOHA_DELTA_MASK if delta_actions else None,
    )
    if not adapt_to_pi:
        return robot
    return replace(
        robot,
        decode_state=_aloha_transform(gripper_to_angle),
        encode_action=_aloha_transform(gripper_from_angle),
        decode_action=_aloha_transform(gripper_from_angle_inverse),
    )


def generic(state_dim: int, action_dim: int, cameras: Sequence[str], dt_s: float) -> Robot:
    """A robot whose units and camera names are those that the checkpoint was trained with."""
    return Robot(
        name="generic",
        state_dim=state_dim,
        action_dim=action_dim,
        dt_s=dt_s,
        cameras={name: name for name in cameras},
    )


ROBOTS = ("aloha", "generic")
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
    name: str, config: PolicyConfig, convention: Convention, settings: Settings
) -> Robot:
    """The robot `name` with the conventions of one checkpoint.

    `settings` decide. What they leave open follows the checkpoint's origin: openpi's expect its
    joint signs, grippers and relative joints, LeRobot's the data set's own numbers.

    Raises:
        ValueError: unknown name, another robot's checkpoint, or dimensions that do not fit.
    """
    if name not in ROBOTS:
        raise ValueError(f"unknown robot {name!r}; known: {', '.join(ROBOTS)}")
    if settings.robot not in (None, name):
        raise ValueError(
            f"the checkpoint is for robot {settings.robot!r} ({SETTINGS_FILE}), not {name!r}"
        )
    if name == "generic":
        robot = _generic_from(config, settings)
    else:
        from_openpi = convention == "openpi"
        robot = aloha(
            adapt_to_pi=from_openpi if settings.adapt_to_pi is None else settings.adapt_to_pi,
            delta_actions=from_openpi if settings.delta_actions is None else settings.delta_actions,
            dt_s=settings.dt_s or 0.02,
        )
    for what, mine, theirs, limit in (
        ("state_dim", robot.state_dim, config.state_dim, config.max_state_dim),
        ("action_dim", robot.action_dim, config.action_dim, config.max_action_dim),
    ):
        if mine > limit or (theirs is not None and theirs != mine):
            raise ValueError(
                f"robot {name!r} has {what} {mine}, the checkpoint {theirs or f'at most {limit}'}"
            )
    return robot


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
