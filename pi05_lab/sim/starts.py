"""Initial states of episodes: random cube places, and arm states that a policy may reach."""

from __future__ import annotations

import numpy as np

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.experts import GRIPPERS, WAVE_POSE, WAVE_RAD, cube_yaw
from pi05_lab.sim.judge import arm_slice, other_side
from pi05_lab.sim.kinematics import ArmKinematics
from pi05_lab.sim.motion import HELD_M, SQUEEZE_M
from pi05_lab.sim.scene import CUBE_HALF_SIZE_M, GRIPPER_OPEN_M, SIDES, mujoco
from pi05_lab.sim.tasks import CUBE_VERBS, MIDDLE_M, Task
from pi05_ros.types import FloatArray

_FREE_MIDDLE_M = 0.09
"""Least distance of other cubes from the middle in "place": the fingers need the room."""
_TRIES = 200
_IN_HAND = ("holding", "burdened")
_DEEPEST_M = -0.001
_LOWEST_TOOL_M = 0.06


def reset_for(sim: SimulatedAloha, task: Task, rng: np.random.Generator) -> None:
    """Reset to both arms at home and random cube places that leave the task to be done.

    For "place" the middle is free and its own cube 6 cm away. "home" is done at home: use
    `random_start` for it.
    """
    for _ in range(_TRIES):
        sim.reset(int(rng.integers(1 << 31)))
        if task.verb != "place":
            return
        distance = {c: np.hypot(*(sim.cube_position(c)[:2] - MIDDLE_M)) for c in sim.cubes}
        own = distance.pop(str(task.color))
        if own > 0.06 and min(distance.values(), default=1.0) > _FREE_MIDDLE_M:
            return
    raise RuntimeError(f"no room for {task} among {len(sim.cubes)} cubes in {_TRIES} tries")


def random_start(sim: SimulatedAloha, task: Task, rng: np.random.Generator) -> str:
    """Reset the simulator to a random state at rest, optionally in the middle of the task.

    Returns:
        The kind of state: "jitter" (arms near home), "away" (arms anywhere above the table),
        "near" (the task's tool near its cube, random gripper opening), "grasping" (the cube
        between open fingers), "holding" (the cube in the hand, low or lifted), "burdened" (another
        cube in the hand), "released" (the cube in the middle, the hand near it), "waving" (near
        the wave's circle).
    """
    shares = {"jitter": 0.2, "away": 0.3}
    if len(sim.cubes) > 1:
        shares["burdened"] = 0.1
    if task.verb in CUBE_VERBS or task.verb == "home":
        shares["near"] = 0.5
    if task.verb in ("pick", "place"):
        shares |= {"grasping": 0.25, "holding": 0.4}
    if task.verb == "place":
        shares["released"] = 0.15
    if task.verb == "wave":
        shares["waving"] = 0.6
    weights = np.array(list(shares.values()))
    kind = str(rng.choice(list(shares), p=weights / weights.sum()))
    starts = _Starts(sim, task, rng)
    for _ in range(_TRIES):
        reset_for(sim, task, rng)
        if starts.place_arms(kind):
            return kind
    raise RuntimeError(f"no {kind!r} start for {task} in {_TRIES} tries")


class _Starts:
    def __init__(self, sim: SimulatedAloha, task: Task, rng: np.random.Generator) -> None:
        self._sim, self._task, self._rng = sim, task, rng
        self._kinematics = ArmKinematics(sim.model)

    def place_arms(self, kind: str) -> bool:
        """Draw one state; False if it is out of reach, in collision, or unstable."""
        rng, sim = self._rng, self._sim
        side = self._task.side or str(rng.choice(SIDES))
        cube = self._task.color or str(rng.choice(sim.cubes))
        if kind == "burdened":
            cube = str(rng.choice([each for each in sim.cubes if each != self._task.color]))
            spot = sim.cube_position(cube)[:2]
            if self._task.verb == "place" and np.hypot(*(spot - MIDDLE_M)) < 0.15:
                return False
        positions = HOME_POSITIONS.copy()
        for each in SIDES:
            spread = 0.35 if kind == "away" or rng.random() < 0.15 else 0.03
            arm = arm_slice(each)
            positions[arm] += spread * rng.normal(size=6) * [1.0, 0.6, 0.6, 0.3, 0.6, 0.3]
            gripper = abs(rng.normal(0, 0.004)) if rng.random() < 0.7 else 0.034
            opened = 0.0226 + gripper * rng.uniform(0.3, 1.0)
            positions[arm.stop] = min(opened, GRIPPER_OPEN_M)
        if kind in ("near", "grasping", "holding", "burdened", "released"):
            if not self._reach(positions, side, cube, kind):
                return False
        elif kind == "waving":
            angle, radius = rng.uniform(0, 2 * np.pi), WAVE_RAD * rng.uniform(0.2, 1.2)
            positions[arm_slice(side)] = WAVE_POSE + rng.normal(0, 0.05, 6)
            start = arm_slice(side).start
            positions[[start, start + 5]] += radius * np.array([np.cos(angle), np.sin(angle)])
        positions = np.clip(positions, sim.lower, sim.upper)
        qpos = self._with_joints(positions)
        if kind == "released":
            spot = np.array([*MIDDLE_M, CUBE_HALF_SIZE_M])
            spot[:2] += rng.uniform(-0.015, 0.015, 2)
            yaw = rng.uniform(-0.4, 0.4)
            turned = np.array(
                [[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
            )
            self._put_cube(qpos, cube, spot, turned)
        if kind in _IN_HAND:
            self._put_cube(qpos, cube, *self._in_hand(positions, side))
        sim.set_qpos(qpos)
        contacts = sim.data.contact
        if len(contacts.dist) and contacts.dist.min() < _DEEPEST_M:
            return False
        if kind in _IN_HAND:
            return self._settle(positions, side, cube)
        scattered = SIDES if kind in ("jitter", "away") else (other_side(side),)
        return all(sim.tool_position(each)[2] > _LOWEST_TOOL_M for each in scattered)

    def _reach(self, positions: FloatArray, side: str, cube: str, kind: str) -> bool:
        """Move one arm to where the kind of state requires it."""
        rng, sim = self._rng, self._sim
        target = sim.cube_position(cube)
        gripper_m = GRIPPER_OPEN_M - rng.uniform(0, 0.006)
        yaw: float | None = None
        if kind == "grasping":
            target += rng.normal(0, 0.005, 3) * [1.0, 1.0, 0.7]
            gripper_m = rng.uniform(0.045, GRIPPER_OPEN_M)
            yaw = cube_yaw(sim, cube)
        elif kind in _IN_HAND:
            if kind == "holding" and self._task.verb == "place" and rng.random() < 0.75:
                share = rng.random()
                target[:2] += share * (np.array(MIDDLE_M) + rng.normal(0, 0.02, 2) - target[:2])
            target[2] += rng.uniform(0, 0.12) if rng.random() < 0.7 else rng.uniform(0, 0.03)
            gripper_m = HELD_M
            yaw = cube_yaw(sim, cube)
        else:
            if kind == "released":
                target[:2] = MIDDLE_M
            angle, radius = rng.uniform(0, 2 * np.pi), abs(rng.normal(0, 0.03))
            height = rng.uniform(0.0, 0.05) if rng.random() < 0.4 else rng.uniform(0.03, 0.15)
            target += [radius * np.cos(angle), radius * np.sin(angle), height]
            if rng.random() < 0.4:
                gripper_m = rng.uniform(0.0226, GRIPPER_OPEN_M)
            yaw = cube_yaw(sim, cube) if rng.random() < 0.7 else None
        pitch = self._kinematics.approach_pitch(side, target) + rng.normal(0, 0.06)
        solution = self._kinematics.solve(side, target, pitch, yaw)
        arm = arm_slice(side)
        positions[arm] = solution.joints + rng.normal(0, 0.008, 6) * (kind not in _IN_HAND)
        positions[arm.stop] = gripper_m
        return solution.reached

    def _in_hand(self, positions: FloatArray, side: str) -> tuple[FloatArray, FloatArray]:
        """Position [3] and rotation [3, 3] of a cube that is held roughly upright."""
        self._sim.set_qpos(self._with_joints(positions))
        pitch = positions[arm_slice(side)][[1, 2, 4]].sum() + self._rng.normal(0, 0.1)
        rotation = self._sim.data.site(f"{side}_tool").xmat.reshape(3, 3)
        cosine, sine = np.cos(pitch), np.sin(pitch)
        upright = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
        offset = rotation @ (self._rng.normal(0, 0.004, 3) * [1.0, 0.0, 1.0])
        return self._sim.tool_position(side) + offset, rotation @ upright

    def _settle(self, positions: FloatArray, side: str, cube: str) -> bool:
        """Squeeze for 0.2 s; whether the cube stays in the hand."""
        sim = self._sim
        targets = positions.copy()
        targets[arm_slice(side).stop] = SQUEEZE_M
        sim.set_targets(targets)
        sim.step(round(0.2 / sim.model.opt.timestep))
        held = np.linalg.norm(sim.cube_position(cube) - sim.tool_position(side)) < 0.015
        sim.data.qvel[:] = 0.0
        return bool(held)

    def _with_joints(self, positions: FloatArray) -> FloatArray:
        """The simulator's qpos with the arms at `positions` [14], the fingers at least touching."""
        parted = positions.copy()
        parted[GRIPPERS] = np.maximum(parted[GRIPPERS], 0.0224)
        return self._sim.qpos(parted)

    def _put_cube(
        self, qpos: FloatArray, cube: str, position: FloatArray, rotation: FloatArray
    ) -> None:
        start = self._sim.model.joint(f"{cube}_cube").qposadr[0]
        qpos[start : start + 3] = position
        mujoco.mju_mat2Quat(qpos[start + 3 : start + 7], rotation.ravel())
