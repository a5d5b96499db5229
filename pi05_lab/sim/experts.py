"""A scripted expert: plans the arms' next second for a task, from any state of the simulator.

Each arm follows a velocity field over its joint angles. The phase of a task (open, go above the
cube, go down, close, lift, …) follows from the positions of the tool, the fingers and the cubes:
planning is stateless and works from disturbed states, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.judge import arm_slice
from pi05_lab.sim.kinematics import ArmKinematics, above
from pi05_lab.sim.motion import (
    CLOSED_ON_CUBE_M,
    CRUISE_RAD_S,
    DT_S,
    HELD_M,
    NEAR_CUBE_M,
    SQUEEZE_M,
    ArmState,
    Field,
    Motion,
    follow,
    ramp,
    servo_lags_s,
    towards,
    within,
)
from pi05_lab.sim.scene import (
    ARM_JOINTS,
    CUBE_HALF_SIZE_M,
    GRIPPER_CLOSED_M,
    GRIPPER_OPEN_M,
    JOINT_NAMES,
    SIDES,
)
from pi05_lab.sim.tasks import MIDDLE_M, Task
from pi05_ros.types import FloatArray

HORIZON = 50

_OPEN_ENOUGH_M = 0.052

_TOUCH_ABOVE_M = 0.029
"""Of the tool over the cube's centre: the fingertips just meet the cube's top."""
_HOVER_M = 0.09
_LIFT_M = 0.13
_CLEAR_M = 0.085
"""The tool's height from which it may move sideways over the cubes."""
_FUNNEL_M = (0.008, 0.045)
"""Sideways distance to a goal: up to the first the tool goes down, from the second on it hovers."""
_PLACED_M = (0.02, CUBE_HALF_SIZE_M + 0.006)
"""Where a cube is released: largest distance from the middle, and height."""

WAVE_POSE = np.array([0.0, -0.8, 1.1, 0.0, -1.0, 0.0])
WAVE_RAD = 0.4
_WAVE_PERIOD_S = 1.6

_STAND = np.zeros(len(ARM_JOINTS))
GRIPPERS = [index for index, name in enumerate(JOINT_NAMES) if name.endswith("gripper")]


def grippers_to_unit(positions: ArrayLike) -> FloatArray:
    """[..., 14] with grippers in m → with grippers from 0 (closed) to 1 (open), as policies do."""
    units = np.array(positions, dtype=np.float64)
    units[..., GRIPPERS] -= GRIPPER_CLOSED_M
    units[..., GRIPPERS] /= GRIPPER_OPEN_M - GRIPPER_CLOSED_M
    return units


def grippers_to_metres(units: ArrayLike) -> FloatArray:
    """The inverse of `grippers_to_unit`."""
    positions = np.array(units, dtype=np.float64)
    positions[..., GRIPPERS] *= GRIPPER_OPEN_M - GRIPPER_CLOSED_M
    positions[..., GRIPPERS] += GRIPPER_CLOSED_M
    return positions


class Expert:
    """Plans a task's next second for both arms; only reads the simulator.

    An arm without a task goes home. A cube in the hand that the task does not carry is put down
    first.
    """

    def __init__(self, sim: SimulatedAloha) -> None:
        self.sim = sim
        self.kinematics = ArmKinematics(sim.model)
        self._lag_s = servo_lags_s(sim)

    def plan(self, task: Task, horizon: int = HORIZON) -> FloatArray:
        """Joint targets [horizon, 14] from the current state on; a function of the state alone.

        The state is the joints' positions and the cubes' poses. Speeds are not part of it, because
        a policy does not see them: a plan from rest starts at full speed. Row k is due in k·20 ms
        and leads the field by the servos' lag, so that the arm itself follows the field. From row
        to row an arm's targets stay below 2 rad/s and 10 rad/s², a gripper's below 0.15 m/s; row 0
        is up to 0.1 rad ahead of the arm. All targets are within their ranges.
        """
        if task.color is not None and task.color not in self.sim.cubes:
            raise ValueError(f"there is no {task.color} cube; the cubes are {self.sim.cubes}")
        positions = self.sim.positions()
        cubes = {cube: self.sim.cube_position(cube) for cube in self.sim.cubes}
        targets = np.empty((horizon, len(JOINT_NAMES)))
        columns = np.arange(len(ARM_JOINTS))
        for side in SIDES:
            arm = arm_slice(side)
            joints, gripper = positions[arm], float(positions[arm.stop])
            tool = self.kinematics.tool_position(side, joints)
            state = ArmState(joints, gripper, tool, cubes)
            lag_steps = self._lag_s[arm] / DT_S
            steps = horizon + int(lag_steps.max()) + 1
            path, grip = follow(self.kinematics, side, self._field(task, side, state), state, steps)
            rows = np.arange(horizon)[:, None] + lag_steps
            below = rows.astype(int)
            low, high = path[below, columns], path[below + 1, columns]
            targets[:, arm] = low + (rows - below) * (high - low)
            targets[:, arm.stop] = grip[:horizon]
        return np.clip(targets, self.sim.lower, self.sim.upper)

    def _field(self, task: Task, side: str, now: ArmState) -> Field:
        mine = task.side == side
        wanted = task.color if mine and task.verb in ("pick", "place") else None
        for cube in now.cubes:
            if cube != wanted and now.holds(cube):
                return self._put_down(side, cube, now)
        if not mine:
            return self._go_home(side, now)
        if task.color is None:
            return self._rise_first(side, now, _wave)
        if task.verb == "touch":
            goal = above(now.cubes[task.color], _TOUCH_ABOVE_M)
            return self._descend(side, now, goal, lambda at: at.free_gripper_m)
        return (self._pick if task.verb == "pick" else self._place)(side, task.color, now)

    def _go_home(self, side: str, now: ArmState) -> Field:
        home = HOME_POSITIONS[arm_slice(side)]
        return self._rise_first(side, now, lambda at: (towards(at.joints, home), at.free_gripper_m))

    def _pick(self, side: str, cube: str, now: ArmState) -> Field:
        grasp = self._grasp(side, cube, now)
        lifted = self.kinematics.solve(side, [*now.cubes[cube][:2], _LIFT_M]).joints
        lifted[5] = self._grasp_wrist(side, cube, now)

        def field(at: ArmState) -> Motion:
            if at.holds(cube):
                return towards(at.joints, lifted), SQUEEZE_M
            return grasp(at)

        return field

    def _place(self, side: str, cube: str, now: ArmState) -> Field:
        grasp = self._grasp(side, cube, now)
        leave = self._go_home(side, now)
        # The cube, not the tool, must reach the middle, and upright.
        held = now.holds(cube)
        offset = now.tool - now.cubes[cube] if held else np.zeros(3)
        spot = np.array([*MIDDLE_M, CUBE_HALF_SIZE_M + 0.001]) + offset
        pitch = self._upright_pitch(side, cube, now) if held else None
        wrist = self._grasp_wrist(side, cube, now)
        carry = self._descend(side, now, spot, lambda _: SQUEEZE_M, pitch=pitch, wrist=wrist)

        def field(at: ArmState) -> Motion:
            *place, height = at.cubes[cube]
            if math.dist(place, MIDDLE_M) < _PLACED_M[0] and height < _PLACED_M[1]:
                if at.gripper_m < _OPEN_ENOUGH_M and at.distance_m(cube) < NEAR_CUBE_M:
                    return _STAND, GRIPPER_OPEN_M
                return leave(at)
            return carry(at) if at.holds(cube) else grasp(at)

        return field

    def _put_down(self, side: str, cube: str, now: ArmState) -> Field:
        leave = self._go_home(side, now)
        low = above(now.tool, CUBE_HALF_SIZE_M + 0.001 - now.cubes[cube][2])
        solution = self.kinematics.solve(side, low, self._upright_pitch(side, cube, now))
        solution.joints[5] = now.joints[5]

        def field(at: ArmState) -> Motion:
            if not at.holds(cube):
                return leave(at) if at.gripper_m > _OPEN_ENOUGH_M else (_STAND, GRIPPER_OPEN_M)
            if at.cubes[cube][2] < _PLACED_M[1] or not solution.reached:
                return _STAND, GRIPPER_OPEN_M
            return towards(at.joints, solution.joints), SQUEEZE_M

        return field

    def _grasp(self, side: str, cube: str, now: ArmState) -> Field:
        """Open, approach the cube from above, close when it is between the fingers."""
        goal, yaw = now.cubes[cube], cube_yaw(self.sim, cube)
        approach = self._descend(side, now, goal, lambda _: GRIPPER_OPEN_M, yaw=yaw, opened=True)

        def field(at: ArmState) -> Motion:
            if at.between_fingers(cube) and at.gripper_m > CLOSED_ON_CUBE_M[0]:
                return _STAND, SQUEEZE_M
            return approach(at)

        return field

    def _descend(
        self,
        side: str,
        now: ArmState,
        goal: FloatArray,
        gripper: Callable[[ArmState], float],
        pitch: float | None = None,
        yaw: float | None = None,
        wrist: float | None = None,
        opened: bool = False,
    ) -> Field:
        """Move the tool to a goal [3] from above, down a funnel; home if it is out of reach.

        With `opened`, the tool stays above until the fingers are open.
        """
        low = self.kinematics.solve(side, goal, pitch, yaw)
        hover = self.kinematics.solve(side, above(goal, _HOVER_M), None, yaw)
        if not (low.reached and hover.reached):
            return self._go_home(side, now)
        if wrist is not None:
            low.joints[5] = hover.joints[5] = wrist

        def height(at: ArmState) -> float:
            return ramp(math.dist(at.tool[:2], goal[:2]), *_FUNNEL_M)

        def field(at: ArmState) -> Motion:
            share = height(at)
            if opened:
                share = max(share, ramp(at.gripper_m, _OPEN_ENOUGH_M, HELD_M))
            joints = low.joints + share * (hover.joints - low.joints)
            return towards(at.joints, joints), gripper(at)

        def surface(at: ArmState) -> float:
            return float(min(goal[2] + height(at) * _HOVER_M, _CLEAR_M))

        return self._rise_first(side, now, field, surface)

    def _rise_first(
        self,
        side: str,
        now: ArmState,
        field: Field,
        surface: Callable[[ArmState], float] = lambda _: _CLEAR_M,
    ) -> Field:
        """Below a surface, move straight up first instead of sideways through the cubes."""
        if now.tool[2] > _CLEAR_M:
            return field
        rise = self.kinematics.solve(side, [*now.tool[:2], _CLEAR_M + 0.03])
        if not rise.reached:
            return field
        rise.joints[5] = now.joints[5]

        def rising(at: ArmState) -> Motion:
            velocity, gripper = field(at)
            share = ramp(surface(at) - at.tool[2], 0.005, 0.025)
            return velocity + share * (towards(at.joints, rise.joints) - velocity), gripper

        return rising

    def _upright_pitch(self, side: str, cube: str, now: ArmState) -> float:
        """The tool's pitch at which a held cube stands upright."""
        axes = self.sim.data.body(f"{cube}_cube").xmat.reshape(3, 3)
        upward = axes[:, np.abs(axes[2]).argmax()]
        upward = upward * np.sign(upward[2])
        base = self.sim.data.body(f"{side}_base").xmat.reshape(3, 3)
        heading = base @ [np.cos(now.joints[0]), np.sin(now.joints[0]), 0.0]
        tilt = np.arctan2(upward @ heading, upward[2])
        return float(np.clip(now.joints[[1, 2, 4]].sum() - tilt, 0.5, 1.6))

    def _grasp_wrist(self, side: str, cube: str, now: ArmState) -> float:
        """wrist_rotate while a cube is carried: the current one, or that of the grasp."""
        if now.holds(cube):
            return float(now.joints[5])
        yaw = cube_yaw(self.sim, cube)
        return float(self.kinematics.solve(side, now.cubes[cube], yaw=yaw).joints[5])


def cube_yaw(sim: SimulatedAloha, cube: str) -> float:
    """The direction of a cube's side faces about z, rad, for any face that it lies on."""
    axes = sim.data.body(f"{cube}_cube").xmat.reshape(3, 3)
    level = axes[:2, np.abs(axes[2]).argmin()]
    return float(np.arctan2(level[1], level[0]))


def _wave(at: ArmState) -> Motion:
    """A limit cycle of waist and wrist_rotate about a raised pose."""
    velocity = towards(at.joints, np.where([1, 0, 0, 0, 0, 1], at.joints, WAVE_POSE))
    raised = 1.0 - ramp(float(np.abs(at.joints - WAVE_POSE)[1:5].max()), 0.1, 0.6)
    x, y = at.joints[0] - WAVE_POSE[0], at.joints[5] - WAVE_POSE[5]
    radius = math.hypot(x, y)
    # The offset avoids the undefined phase at the circle's centre.
    phase = math.atan2(y, x + 0.1 * max(WAVE_RAD - radius, 0.0))
    outward = within(3.0 * (WAVE_RAD - radius), CRUISE_RAD_S)
    along = raised * min(radius, WAVE_RAD) * 2 * math.pi / _WAVE_PERIOD_S
    velocity[0] = outward * math.cos(phase) - along * math.sin(phase)
    velocity[5] = outward * math.sin(phase) + along * math.cos(phase)
    return velocity, at.free_gripper_m
