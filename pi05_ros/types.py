"""What the packages exchange: observations, action chunks, policies, the robot's joints.

Times are seconds on one clock, the clock of the observation stamps (ROS time on a robot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
"""Of float64; numpy's stubs before 2.3 call the result of arithmetic floating alone."""
ImageArray = NDArray[np.uint8]
HEADS = ("flow", "fast")
"""What predicts a chunk: the action expert, or the language model's next tokens."""


@dataclass(frozen=True)
class Observation:
    """Images, joint state and instruction at one time."""

    images: Mapping[str, ImageArray]
    """Camera name → RGB image [height, width, 3]; a missing camera is masked."""
    state: FloatArray
    """[state_dim] joint values in the policy's robot units, in the robot's joint order."""
    instruction: str
    stamp_s: float
    """Time of the images and the state."""
    past: tuple[Observation, ...] = ()
    """Earlier observations, oldest first, for a policy with `history_steps`."""


@dataclass(frozen=True)
class ActionChunk:
    """Predicted actions: step k belongs to `stamp_s + k * dt_s`."""

    actions: FloatArray
    """[horizon, action_dim] in the policy's robot units, absolute."""
    stamp_s: float
    """Stamp of the observation behind the prediction."""
    dt_s: float
    instruction: str = ""
    timings_s: Mapping[str, float] = field(default_factory=dict)
    """Inference time by stage."""
    normalized: NDArray[np.float32] | None = None
    """[horizon, max_action_dim], output of the network, for guidance of the next chunk."""

    @property
    def horizon(self) -> int:
        return int(self.actions.shape[0])

    @property
    def end_s(self) -> float:
        """Time of the last step."""
        return self.stamp_s + (self.horizon - 1) * self.dt_s


@dataclass(frozen=True)
class ActionPrefix:
    """Present plan from an observation's stamp on, which the next chunk continues."""

    actions: FloatArray
    """[n, action_dim] absolute, step k due at the stamp + k * dt_s; n may be below the horizon."""
    committed_steps: int
    """Number of first steps that are executed before the next chunk can take effect."""


class Level(IntEnum):
    """Severity, as in diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass(frozen=True)
class Problem:
    """A reason why no inference can start or no command is sent."""

    part: str
    """Which input or part of the node: "camera", "joints", "instruction", "start", "policy"…"""
    text: str
    """One line for a person; figures in it may change while the problem stays the same."""
    level: Level = Level.WARN
    names: tuple[str, ...] = ()
    """The cameras or the topic that it concerns, where `part` has several."""

    def __str__(self) -> str:
        return self.text


class Policy(Protocol):
    """What the executor runs: π0.5, or an adapter of another policy.

    Optional: `check_instruction(text)`, thread safe, raises ValueError for an instruction that the
    policy cannot use; `history_steps`, the number of earlier observations that it needs, `dt_s`
    apart; `restart(seed)`, which makes the noise of the inferences that follow repeatable;
    `continues_prefixes`, whether `infer` takes a prefix.
    """

    @property
    def horizon(self) -> int:
        """Steps in a chunk."""

    @property
    def dt_s(self) -> float:
        """Time between two steps of a chunk."""

    @property
    def state_dim(self) -> int: ...

    @property
    def action_dim(self) -> int: ...

    @property
    def cameras(self) -> Sequence[str]:
        """Cameras of the training data."""

    @property
    def description(self) -> str:
        """One line for the user: which policy, how large, trained or not."""

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """Predict a chunk, which continues `prefix` (policy units) if it is given."""


LARGEST_JOINT_VALUE = 1e6
"""Bound of a joint's limits and units: beyond any robot, and no square of it overflows."""


@dataclass(frozen=True)
class JointSpec:
    """One commanded joint in the controller's units: rad, or m for a prismatic gripper.

    The policy sees `(joint - policy_offset) / policy_scale`, for example 0–1 for ALOHA's grippers.
    """

    name: str
    lower: float
    upper: float
    max_velocity: float
    max_acceleration: float
    policy_scale: float = 1.0
    policy_offset: float = 0.0
    gripper: bool = False
    max_tracking_error: float = 0.0
    """Largest distance of measured from commanded position, in joint units; 0: the default."""

    def __post_init__(self) -> None:
        values = (
            self.lower,
            self.upper,
            self.max_velocity,
            self.max_acceleration,
            self.policy_scale,
            self.policy_offset,
        )
        if not all(np.isfinite(values)):
            raise ValueError(f"joint {self.name!r}: every limit and unit must be finite: {values}")
        if max(map(abs, values)) > LARGEST_JOINT_VALUE:
            raise ValueError(
                f"joint {self.name!r}: no limit or unit may be beyond {LARGEST_JOINT_VALUE:g} "
                f"(rad, m, per second): {values}"
            )
        if self.lower >= self.upper:
            raise ValueError(f"joint {self.name!r}: lower {self.lower} is not below {self.upper}")
        if self.max_velocity <= 0 or self.max_acceleration <= 0:
            raise ValueError(f"joint {self.name!r}: velocity and acceleration limits must be > 0")
        if not (np.isfinite(self.max_tracking_error) and self.max_tracking_error >= 0):
            raise ValueError(f"joint {self.name!r}: max_tracking_error must be finite and >= 0")
        if self.policy_scale == 0:
            raise ValueError(f"joint {self.name!r}: policy_scale must not be 0")


class JointGroup:
    """Commanded joints in the policy's order, as arrays."""

    def __init__(self, joints: Sequence[JointSpec]) -> None:
        names = [joint.name for joint in joints]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"joint names must be given once each, got {names}")
        self.joints = tuple(joints)
        self.names = tuple(names)
        self.lower = self._array("lower")
        self.upper = self._array("upper")
        self.max_velocity = self._array("max_velocity")
        self.max_acceleration = self._array("max_acceleration")
        self.max_tracking_error = self._array("max_tracking_error")
        self.gripper = np.array([joint.gripper for joint in joints], dtype=bool)
        self._scale = self._array("policy_scale")
        self._offset = self._array("policy_offset")

    def __len__(self) -> int:
        return len(self.joints)

    def _array(self, attribute: str) -> FloatArray:
        return np.array([getattr(joint, attribute) for joint in self.joints], dtype=np.float64)

    def to_policy(self, positions: FloatArray) -> FloatArray:
        """[..., n_joints] controller units → policy units."""
        return (positions - self._offset) / self._scale

    def to_joints(self, actions: FloatArray) -> FloatArray:
        """[..., n_joints] policy units → controller units."""
        return actions * self._scale + self._offset
