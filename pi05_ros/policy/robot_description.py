"""A robot as a checkpoint sees it, in words: names, rate, cameras, signs, grippers, deltas.

Every field may stand in a YAML file or a mapping, so that a robot needs no code. The named ones
follow openpi `aloha_policy.py`, `droid_policy.py`, `libero_policy.py`, `examples/ur5` and
`training/config.py`; DROID's 0.2 rad a step is `relative_max_joint_delta` of DROID's controller.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pi05_ros.policy.grippers import GRIPPER_MAPS

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
