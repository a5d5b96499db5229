"""The simulated ALOHA: 14 position-controlled joints and three cubes, without ROS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pi05_lab.sim.scene import (
    ARM_JOINTS,
    CUBE_HALF_SIZE_M,
    JOINT_NAMES,
    SIDES,
    build_model,
    mujoco,
)
from pi05_ros.types import FloatArray

HOME_POSITIONS: FloatArray = np.array([0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.024] * 2)
HOME_POSITIONS.setflags(write=False)
"""[14] the arms after `reset`: rad, and the nearly closed fingers' position in m."""

CUBE_REGION_M = ((-0.22, 0.22), (0.42, 0.66))
"""x and y range of the cubes' centres after `reset`: both arms reach all of it."""
CUBE_SPACING_M = 0.09
CUBE_YAW_RAD = 0.4


class SimulatedAloha:
    """Two ViperX 300s arms at a table with cubes, stepped in real or any other time.

    Joints are in the order of `JOINT_NAMES`. Twelve are angles in rad. A gripper is the position
    of one finger in m, in the convention of openpi and gym-aloha: 0.01844 is closed (0), 0.058 is
    open (1). The pads meet at 0.0224, so that a closed gripper reads 0.0224 and squeezes; a held
    cube reads 0.042, or up to 0.05 askew.

    Not thread-safe: step and read from one thread, and pass `qpos()` to others.
    """

    def __init__(self, cubes: Sequence[str] = ("red", "green", "blue")) -> None:
        self.cubes = tuple(cubes)
        self.model = build_model(self.cubes)
        self.data = mujoco.MjData(self.model)
        # Two rows: a gripper is the mean of its two fingers, a hinge is in both rows.
        pairs = [
            (f"{side}_left_finger", f"{side}_right_finger")
            if joint == "gripper"
            else (f"{side}_{joint}",) * 2
            for side in SIDES
            for joint in (*ARM_JOINTS, "gripper")
        ]
        rows = list(zip(*pairs, strict=True))
        joints = [[self.model.joint(name) for name in row] for row in rows]
        self._qpos_index = np.array([[joint.qposadr[0] for joint in row] for row in joints])
        self._qvel_index = np.array([[joint.dofadr[0] for joint in row] for row in joints])
        actuators = [[self.model.actuator(name).id for name in row] for row in rows]
        self._actuator_index = np.array(actuators)
        self._sign = np.array([[1.0] * 14, [1.0 - 2.0 * (a != b) for a, b in pairs]])
        self.lower, self.upper = self.model.actuator_ctrlrange[self._actuator_index[0]].T.copy()
        self._cube_qpos = {
            name: int(self.model.joint(f"{name}_cube").qposadr[0]) for name in self.cubes
        }
        self.reset()

    @property
    def time_s(self) -> float:
        """Simulated time since the last reset."""
        return float(self.data.time)

    def reset(self, seed: int | None = None) -> None:
        """Put the arms at home and the cubes at random places at least 9 cm apart."""
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self._qpos_index] = self._sign * HOME_POSITIONS
        low, high = np.array(CUBE_REGION_M).T
        places: list[FloatArray] = []
        while len(places) < len(self.cubes):
            place = rng.uniform(low, high)
            if all(np.linalg.norm(place - other) >= CUBE_SPACING_M for other in places):
                places.append(place)
        for name, place in zip(self.cubes, places, strict=True):
            half_yaw = 0.5 * rng.uniform(-CUBE_YAW_RAD, CUBE_YAW_RAD)
            start = self._cube_qpos[name]
            self.data.qpos[start : start + 7] = [
                *place, CUBE_HALF_SIZE_M, np.cos(half_yaw), 0.0, 0.0, np.sin(half_yaw)
            ]  # fmt: skip
        self.set_targets(HOME_POSITIONS)
        mujoco.mj_forward(self.model, self.data)

    def positions(self) -> FloatArray:
        """[14] measured positions, rad and m."""
        return (self._sign * self.data.qpos[self._qpos_index]).mean(axis=0)

    def velocities(self) -> FloatArray:
        """[14] measured velocities, rad/s and m/s."""
        return (self._sign * self.data.qvel[self._qvel_index]).mean(axis=0)

    def set_targets(self, positions: ArrayLike) -> None:
        """Set the position servos' targets, [14] finite rad and m; clipped to `lower`, `upper`."""
        targets = np.asarray(positions, dtype=np.float64)
        if targets.shape != (len(JOINT_NAMES),) or not np.isfinite(targets).all():
            raise ValueError(f"targets must be {len(JOINT_NAMES)} finite numbers, got {targets}")
        self.data.ctrl[self._actuator_index] = self._sign * np.clip(targets, self.lower, self.upper)

    def step(self, n_steps: int = 1) -> None:
        """Advance `n_steps` physics steps; RuntimeError if the simulation diverged."""
        mujoco.mj_step(self.model, self.data, n_steps)
        kinds = mujoco.mjtWarning
        bad = (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)
        if any(self.data.warning[int(kind)].number for kind in bad):
            raise RuntimeError("the simulation diverged; call reset() and send smoother targets")
        # mj_step leaves body poses one step behind qpos.
        mujoco.mj_kinematics(self.model, self.data)

    def cube_position(self, name: str) -> FloatArray:
        """[3] centre of a cube in the world, m."""
        if name not in self._cube_qpos:
            raise ValueError(f"there is no {name!r} cube; the cubes are {self.cubes}")
        start = self._cube_qpos[name]
        return self.data.qpos[start : start + 3].copy()

    def tool_position(self, side: str) -> FloatArray:
        """[3] the point between the fingertips of the "left" or "right" arm in the world, m."""
        if side not in SIDES:
            raise ValueError(f"side must be one of {SIDES}, got {side!r}")
        return self.data.site(f"{side}_tool").xpos.copy()

    def qpos(self, positions: FloatArray | None = None) -> FloatArray:
        """[nq] a copy of the whole configuration, with the joints at `positions` [14] if given."""
        qpos = self.data.qpos.copy()
        if positions is not None:
            qpos[self._qpos_index] = self._sign * positions
        return qpos

    def set_qpos(self, qpos: ArrayLike) -> None:
        """Set the finite configuration `qpos` [nq], at rest, as the servos' targets."""
        array = np.asarray(qpos, dtype=np.float64)
        if array.shape != (self.model.nq,) or not np.isfinite(array).all():
            raise ValueError(f"qpos must be {self.model.nq} finite numbers, got {array.shape}")
        self.data.qpos[:] = array
        self.data.qvel[:] = 0.0
        self.data.act[:] = 0.0
        self.set_targets(self.positions())
        mujoco.mj_forward(self.model, self.data)
