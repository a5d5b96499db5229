"""Rollout of a velocity field for one arm: speeds, the gripper, and a held cube."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.kinematics import ArmKinematics
from pi05_lab.sim.scene import GRIPPER_OPEN_M, JOINT_NAMES
from pi05_ros.types import FloatArray

DT_S = 0.02
HELD_M = 0.042
"""Measured position of a gripper with a cube between its pads."""

CRUISE_RAD_S = 1.2
_BRAKING_RAD_S2 = 3.5
_LARGEST_RAD_S2 = 7.0
_SETTLING_HZ = 10.0
"""Near its goal a joint's speed is this times the remaining angle."""
_GRIPPER_M_S = 0.14
_LARGEST_GRIPPER_M_S = 0.15
_GRIPPER_LEAD_M = 0.006
"""Distance of a command ahead of the fingers: it moves them at `_GRIPPER_M_S`, or squeezes."""
SQUEEZE_M = HELD_M - _GRIPPER_LEAD_M
"""Pads press with 5 N: the finger servos have 800 N/m."""

CLOSED_ON_CUBE_M = (0.037, 0.0445)
"""Gripper positions between which a cube at the tool is held."""
_GRASP_M = (0.015, 0.014)
"""Largest distance of a cube's centre from the tool, sideways and in height, to close on it."""
_HELD_RADIUS_M = 0.022
NEAR_CUBE_M = 0.05
"""Distance of tool and cube up to which closing fingers might catch it."""

_HOME_GRIPPER_M = float(HOME_POSITIONS[JOINT_NAMES.index("left_gripper")])


@dataclass
class ArmState:
    """Predicted state of one arm and the cubes; a held cube moves with the tool."""

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
        """Goal of a gripper without a task: home, but open beside a cube that it has released."""
        opened = self.gripper_m > CLOSED_ON_CUBE_M[1] - 1e-3
        if opened and any(self.distance_m(cube) < NEAR_CUBE_M for cube in self.cubes):
            return GRIPPER_OPEN_M
        return _HOME_GRIPPER_M


Motion = tuple[FloatArray, float]
"""An arm's joint velocities [6] rad/s and its gripper's goal, m."""
Field = Callable[[ArmState], Motion]


def follow(
    kinematics: ArmKinematics, side: str, field: Field, state: ArmState, steps: int
) -> tuple[FloatArray, FloatArray]:
    """Integrate a field from a state on.

    Returns the arm's joints [steps + 2, 6], rad, from the state's on, and the gripper's commands
    [steps + 1], m.
    """
    path: list[FloatArray] = [state.joints]
    grip: list[float] = []
    velocity: FloatArray | None = None
    carried = next((cube for cube in state.cubes if state.holds(cube)), None)
    for _ in range(steps + 1):
        wanted, gripper_goal = field(state)
        if velocity is None:
            velocity = wanted
        change = wanted - velocity
        share = _LARGEST_RAD_S2 * DT_S / max(float(np.abs(change).max()), 1e-12)
        velocity = velocity + change * min(1.0, share)
        joints = state.joints + velocity * DT_S
        lead = within(gripper_goal - state.gripper_m, _GRIPPER_LEAD_M)
        last = grip[-1] if grip else state.gripper_m + lead
        step = within(state.gripper_m + lead - last, _LARGEST_GRIPPER_M_S * DT_S)
        grip.append(last + step)
        fingers = state.gripper_m + within(lead, _GRIPPER_M_S * DT_S)
        blocked = min(HELD_M, state.gripper_m)
        if fingers < blocked and any(
            state.between_fingers(cube) or state.holds(cube) for cube in state.cubes
        ):
            fingers = blocked
        tool = kinematics.tool_position(side, joints)
        cubes = state.cubes
        if carried is not None:
            cubes = {**cubes, carried: cubes[carried] + tool - state.tool}
        state = ArmState(joints, fingers, tool, cubes)
        carried = next((cube for cube in cubes if state.holds(cube)), None)
        path.append(joints)
    return np.array(path), np.array(grip)


def servo_lags_s(sim: SimulatedAloha) -> FloatArray:
    """[14] delay of the joints behind a moving target: (kv + damping) / kp."""
    lags = []
    for name in JOINT_NAMES:
        name = name.replace("gripper", "left_finger")
        actuator, joint = sim.model.actuator(name), sim.model.joint(name)
        lags.append((joint.damping[0] - actuator.biasprm[2]) / actuator.gainprm[0])
    return np.array(lags)


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, smooth between; falling if low > high."""
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return share * share * (3.0 - 2.0 * share)


def within(value: float, largest: float) -> float:
    """The value, clipped to ±largest."""
    return min(max(value, -largest), largest)


def towards(joints: FloatArray, goal: FloatArray) -> FloatArray:
    """[6] rad/s: straight to the goal, all joints arriving together, braking in time."""
    offset = goal - joints
    left = max(float(np.abs(offset).max()), 1e-12)
    speed = min(CRUISE_RAD_S, math.sqrt(2 * _BRAKING_RAD_S2 * left), _SETTLING_HZ * left)
    return offset * (speed / left)
