"""Forward and inverse kinematics of one arm, on MuJoCo's own Jacobians and a private MjData."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_lab.sim.scene import ARM_JOINTS, SIDES, mujoco
from pi05_ros.types import FloatArray

REACHED_M = 1e-3
STEEPEST_PITCH_RAD = 1.45
"""Nearly straight down, with the fingers on both sides of a cube."""

_PITCH_WEIGHT_M = 0.2
_DAMPING = 1e-5
_LARGEST_STEP_RAD = 0.5
_ITERATIONS = 15
_STRETCH = 0.95
"""Largest share of the two long links' length in an approach, away from the singularity."""
_START = np.array([0.0, -0.2, 0.8, 0.0, 0.7, 0.0])
"""Elbow up, tool down: from here the iteration converges to the posture that clears the table."""
_PLANAR = [1, 2, 4]
_FREE = [0, *_PLANAR]


@dataclass(frozen=True)
class IkSolution:
    """The closest reachable posture."""

    joints: FloatArray
    """[6] rad, in the order of `scene.ARM_JOINTS`, within the joints' ranges."""
    error_m: float
    """Distance of the tool from the wanted position."""

    @property
    def reached(self) -> bool:
        """Within 1 mm of the wanted position."""
        return self.error_m <= REACHED_M


@dataclass(frozen=True)
class _Arm:
    qpos: NDArray[np.int64]
    dofs: NDArray[np.int64]
    site: int
    origin: FloatArray
    """[3] where waist and shoulder axes meet, world."""
    forward: FloatArray
    """[2] the direction of waist = 0 on the table."""
    lower: FloatArray
    upper: FloatArray


def above(position: FloatArray, height_m: float) -> FloatArray:
    """[3] the point `height_m` over a position [3]."""
    raised = position.copy()
    raised[2] += height_m
    return raised


class ArmKinematics:
    """Tool positions and joint angles of both arms of one model.

    The forearm never rolls in a solution, so an arm is a plane that the waist turns, and the tool's
    pitch below the horizontal is shoulder + elbow + wrist_angle.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, self._data)
        self._jacobian = np.zeros((3, model.nv))
        self._arms = {side: self._arm(side) for side in SIDES}
        hand = model.body("left_gripper_link").pos[0] + model.site("left_tool").pos[0]
        upper_arm = np.linalg.norm(model.body("left_upper_forearm_link").pos)
        links = ("left_lower_forearm_link", "left_wrist_link")
        forearm = sum(model.body(link).pos[0] for link in links)
        self._hand_m, self._stretch_m = float(hand), _STRETCH * float(upper_arm + forearm)

    def _arm(self, side: str) -> _Arm:
        joints = [self._model.joint(f"{side}_{name}") for name in ARM_JOINTS]
        lower, upper = np.array([joint.range for joint in joints]).T
        return _Arm(
            qpos=np.array([joint.qposadr[0] for joint in joints]),
            dofs=np.array([joint.dofadr[0] for joint in joints])[_FREE],
            site=int(self._model.site(f"{side}_tool").id),
            origin=self._data.body(f"{side}_upper_arm_link").xpos.copy(),
            forward=self._data.body(f"{side}_base").xmat.reshape(3, 3)[:2, 0].copy(),
            lower=lower,
            upper=upper,
        )

    def tool_position(self, side: str, joints: FloatArray) -> FloatArray:
        """[3] the tool of "left" or "right" for arm joints [6] rad, world, m."""
        arm = self._arms[side]
        self._data.qpos[arm.qpos] = joints
        mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[arm.site].copy()

    def approach_pitch(self, side: str, position: ArrayLike) -> float:
        """The steepest pitch below the horizontal, rad, at which the arm reaches `position` [3].

        With the wrist at the distance `_stretch_m` from the shoulder, the law of cosines gives
        ρ cos(pitch + elevation) = (ρ² + hand² − stretch²) / 2 hand.
        """
        x, y, height = np.asarray(position, dtype=np.float64) - self._arms[side].origin
        radius, hand = np.hypot(x, y), self._hand_m
        distance = np.hypot(radius, height)
        cosine = (distance**2 + hand**2 - self._stretch_m**2) / (2 * hand * distance)
        pitch = np.arccos(np.clip(cosine, -1.0, 1.0)) - np.arctan2(height, radius)
        return float(min(pitch, STEEPEST_PITCH_RAD))

    def solve(
        self, side: str, position: ArrayLike, pitch: float | None = None, yaw: float | None = None
    ) -> IkSolution:
        """Joints that bring the tool to a position, by damped least squares.

        Args:
            side: "left" or "right".
            position: [3] of the tool, world, finite, m.
            pitch: of the tool below the horizontal, rad; `approach_pitch` if None.
            yaw: of a box's faces about z, rad, for the fingers to close on; wrist_rotate turns by
                at most about 45° for it, and stays 0 if None.
        """
        target = np.asarray(position, dtype=np.float64)
        if target.shape != (3,) or not np.isfinite(target).all():
            raise ValueError(f"position must be three finite numbers, got {position!r}")
        arm = self._arms[side]
        pitch = self.approach_pitch(side, target) if pitch is None else pitch
        joints = _START.copy()
        (x, y), (forward_x, forward_y) = target[:2] - arm.origin[:2], arm.forward
        waist = np.arctan2(forward_x * y - forward_y * x, forward_x * x + forward_y * y)
        joints[0] = np.clip(waist, arm.lower[0], arm.upper[0])
        for _ in range(_ITERATIONS):
            error = target - self.tool_position(side, joints)
            pitch_error = pitch - joints[_PLANAR].sum()
            if np.abs(error).max() < 1e-4 and abs(pitch_error) < 1e-3:
                break
            mujoco.mj_comPos(self._model, self._data)
            mujoco.mj_jacSite(self._model, self._data, self._jacobian, None, arm.site)
            pitch_row = [0.0, *[_PITCH_WEIGHT_M] * len(_PLANAR)]
            jacobian = np.vstack((self._jacobian[:, arm.dofs], pitch_row))
            residual = np.append(error, _PITCH_WEIGHT_M * pitch_error)
            damped = jacobian @ jacobian.T + _DAMPING * np.eye(4)
            step = jacobian.T @ np.linalg.solve(damped, residual)
            step *= min(1.0, _LARGEST_STEP_RAD / max(np.abs(step).max(), 1e-9))
            joints[_FREE] = np.clip(joints[_FREE] + step, arm.lower[_FREE], arm.upper[_FREE])
        error_m = float(np.linalg.norm(target - self.tool_position(side, joints)))
        if yaw is not None:
            # Turn the fingers' axis to the nearest of the box's four faces. Unturned, that axis is
            # horizontal and square to the arm's plane. Turned by θ about a hand that points down
            # by `pitch`, its horizontal part has turned by −atan(tan θ · sin(pitch)).
            heading = joints[0] + np.arctan2(forward_y, forward_x)
            turn = (yaw - heading + np.pi / 4) % (np.pi / 2) - np.pi / 4
            down = max(abs(np.sin(joints[_PLANAR].sum())), 0.3)
            joints[5] = -np.arctan2(np.tan(turn), down)
        return IkSolution(joints, error_m)
