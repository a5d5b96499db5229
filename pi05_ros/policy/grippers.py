"""How a gripper's opening relates to what a checkpoint calls it.

Source: openpi `aloha_policy.py`. Openings go from 0 (closed) to 1 (open). The base checkpoints have
the angle of ALOHA's gripper crank, in their own range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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
