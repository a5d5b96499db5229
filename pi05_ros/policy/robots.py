"""What a robot's numbers mean to a checkpoint: dimensions, cameras, joint signs, grippers, deltas.

Source: openpi `aloha_policy.py`, `transforms.py` (DeltaActions, AbsoluteActions) and
`training/config.py`. LeRobot has no joint flips or gripper maps. The robots themselves are in
`robot_description`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.grippers import GRIPPER_MAPS, Transform, identity
from pi05_ros.policy.normalize import Convention
from pi05_ros.policy.robot_description import NAMED, RobotDescription, read_description
from pi05_ros.policy.weights import CheckpointError, read_json
from pi05_ros.types import FloatArray

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
