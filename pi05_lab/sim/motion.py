"""How an arm moves through a foreseen second: speeds, the gripper, and a cube in the hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi05_lab.sim.arms import GRIPPER_OPEN_M, HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.kinematics import ArmKinematics
from pi05_lab.sim.scene import JOINT_NAMES

FloatArray = NDArray[np.float64]

DT_S = 0.02
HELD_M = 0.042
"""What a gripper reads with a cube between its pads."""

CRUISE_RAD_S = 1.2
_BRAKING_RAD_S2 = 3.5
_LARGEST_RAD_S2 = 7.0
_SETTLING_HZ = 10.0
"""Near its goal a joint's speed is this times the angle that is left."""
_GRIPPER_M_S = 0.14
_LARGEST_GRIPPER_M_S = 0.15
_GRIPPER_LEAD_M = 0.006
"""How far a command is ahead of the fingers: what moves them at `_GRIPPER_M_S`, or squeezes."""
SQUEEZE_M = HELD_M - _GRIPPER_LEAD_M
"""Pads press with 5 N: the finger servos have 800 N/m."""

CLOSED_ON_CUBE_M = (0.037, 0.0445)
"""Between these a gripper with a cube at its tool has it in the hand."""
_GRASP_M = (0.015, 0.014)
"""How far a cube's centre may be from the tool, sideways and in height, to close on it."""
_HELD_RADIUS_M = 0.022
NEAR_CUBE_M = 0.05
"""Distance of tool and cube up to which closing fingers might catch it."""

_HOME_GRIPPER_M = float(HOME_POSITIONS[JOINT_NAMES.index("left_gripper")])


@dataclass
class Moment:
    """One arm in a foreseen world, in which a cube between closed fingers goes with the tool."""

    joints: FloatArray
    gripper_m: float
    tool: FloatArray
    cubes: dict[str, FloatArray]

    def holds(self, cube: str) -> bool:
        low, high = CLOSED_ON_CUBE_M
        return low < self.gripper_m < high and self.distance_m(cube) < _HELD_RADIUS_M

    def between_fingers(self, cube: str) -> bool:
        x, y, z = (self.cubes[cube] - self.tool).tolist()
        return math.hypot(x, y) < _GRASP_M[0] and abs(z) < _GRASP_M[1]

    def distance_m(self, cube: str) -> float:
        return math.dist(self.cubes[cube], self.tool)

    @property
    def free_gripper_m(self) -> float:
        """Where a gripper with nothing to grasp goes: home, but clear of a cube that it let go."""
        opened = self.gripper_m > CLOSED_ON_CUBE_M[1] - 1e-3
        if opened and any(self.distance_m(cube) < NEAR_CUBE_M for cube in self.cubes):
            return GRIPPER_OPEN_M
        return _HOME_GRIPPER_M


Field = Callable[[Moment], tuple[FloatArray, float]]
"""A moment → the arm's joint velocities [6] rad/s and where its gripper should go, m."""


def follow(
    kinematics: ArmKinematics, side: str, field: Field, moment: Moment, steps: int
) -> tuple[FloatArray, FloatArray]:
    """Integrates a field from a moment on.

    Returns:
        The arm's joints [steps + 2, 6], rad, from the moment's own on; and the gripper's commands
        [steps + 1], m.
    """
    path: list[FloatArray] = [moment.joints]
    grip: list[float] = []
    velocity: FloatArray | None = None
    carried = next((cube for cube in moment.cubes if moment.holds(cube)), None)
    for _ in range(steps + 1):
        wanted, gripper_goal = field(moment)
        if velocity is None:
            velocity = wanted
        velocity = velocity + _limited(wanted - velocity, _LARGEST_RAD_S2 * DT_S)
        joints = moment.joints + velocity * DT_S
        lead = within(gripper_goal - moment.gripper_m, _GRIPPER_LEAD_M)
        last = grip[-1] if grip else moment.gripper_m + lead
        change = moment.gripper_m + lead - last
        grip.append(last + within(change, _LARGEST_GRIPPER_M_S * DT_S))
        fingers = moment.gripper_m + within(lead, _GRIPPER_M_S * DT_S)
        blocked = min(HELD_M, moment.gripper_m)
        if fingers < blocked and any(
            moment.between_fingers(cube) or moment.holds(cube) for cube in moment.cubes
        ):
            fingers = blocked
        tool = kinematics.tool_position(side, joints)
        cubes = moment.cubes
        if carried is not None:
            cubes = {**cubes, carried: cubes[carried] + tool - moment.tool}
        moment = Moment(joints, fingers, tool, cubes)
        carried = next((cube for cube in cubes if moment.holds(cube)), None)
        path.append(joints)
    return np.array(path), np.array(grip)


def servo_lags_s(sim: SimulatedAloha) -> FloatArray:
    """[14] how far the joints are behind a moving target: (kv + damping) / kp."""
    names = [
        name.replace("gripper", "left_finger") if name.endswith("gripper") else name
        for name in JOINT_NAMES
    ]
    actuators = [sim.model.actuator(name) for name in names]
    joints = [sim.model.joint(name) for name in names]
    return np.array(
        [
            (joint.damping[0] - actuator.biasprm[2]) / actuator.gainprm[0]
            for actuator, joint in zip(actuators, joints, strict=True)
        ]
    )


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, smooth between; falling if low > high."""
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return share * share * (3.0 - 2.0 * share)


def within(value: float, largest: float) -> float:
    """The value, between -largest and largest."""
    return min(max(value, -largest), largest)


def _limited(vector: FloatArray, largest: float) -> FloatArray:
    """The vector, shortened until no entry is larger than `largest`."""
    return vector * min(1.0, largest / max(float(np.abs(vector).max()), 1e-12))


def towards(joints: FloatArray, goal: FloatArray) -> FloatArray:
    """[6] rad/s: straight to the goal, all joints arriving together, braking in time."""
    offset = goal - joints
    left = max(float(np.abs(offset).max()), 1e-12)
    speed = min(CRUISE_RAD_S, math.sqrt(2 * _BRAKING_RAD_S2 * left), _SETTLING_HZ * left)
    return offset * (speed / left)
