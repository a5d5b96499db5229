"""Faults pinned: solutions that miss the position, the pitch or the cube's faces in the simulator
itself, leave the joints' ranges, or claim to reach what is out of reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.kinematics import STEEPEST_PITCH_RAD, ArmKinematics
from pi05_lab.sim.scene import ARM_JOINTS, SIDES

SIM = SimulatedAloha(cubes=())
KINEMATICS = ArmKinematics(SIM.model)
sides = st.sampled_from(SIDES)
reachable = st.tuples(st.floats(-0.22, 0.22), st.floats(0.42, 0.66), st.floats(0.02, 0.2))


def put(side: str, joints: np.ndarray) -> None:
    qpos = SIM.qpos()
    for name, angle in zip(ARM_JOINTS, joints, strict=True):
        qpos[SIM.model.joint(f"{side}_{name}").qposadr[0]] = angle
    SIM.set_qpos(qpos)


@settings(max_examples=60, deadline=None)
@given(sides, reachable)
def test_reachable_points_are_reached_with_the_requested_pitch(
    side: str, position: tuple[float, float, float]
) -> None:
    pitch = KINEMATICS.approach_pitch(side, position)
    assert 0.3 < pitch <= STEEPEST_PITCH_RAD
    solution = KINEMATICS.solve(side, position)
    assert solution.reached
    put(side, solution.joints)
    assert np.linalg.norm(SIM.tool_position(side) - position) < 1e-3
    along = SIM.data.site(f"{side}_tool").xmat.reshape(3, 3)[:, 0]
    assert math.asin(-along[2]) == pytest.approx(pitch, abs=2e-3)
    assert solution.joints[3] == 0
    assert (np.abs(solution.joints) < math.pi).all()


@settings(max_examples=60, deadline=None)
@given(sides, reachable, st.floats(-3.1, 3.1))
def test_the_fingers_close_on_the_faces(
    side: str, position: tuple[float, float, float], yaw: float
) -> None:
    put(side, KINEMATICS.solve(side, position, yaw=yaw).joints)
    across = SIM.data.site(f"{side}_tool").xmat.reshape(3, 3)[:, 1]
    difference = math.atan2(across[1], across[0]) - yaw
    assert abs(math.remainder(difference, math.pi / 2)) < 1e-2


@given(sides, st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-1, 2)))
@settings(max_examples=60, deadline=None)
def test_any_solution_is_within_the_ranges_with_its_true_error(
    side: str, position: tuple[float, float, float]
) -> None:
    solution = KINEMATICS.solve(side, position)
    ranges = np.array([SIM.model.joint(f"{side}_{name}").range for name in ARM_JOINTS])
    assert (solution.joints >= ranges[:, 0]).all()
    assert (solution.joints <= ranges[:, 1]).all()
    put(side, solution.joints)
    error_m = np.linalg.norm(SIM.tool_position(side) - position)
    assert solution.error_m == pytest.approx(error_m, abs=1e-9)
    assert solution.reached == (error_m <= 1e-3)


@pytest.mark.parametrize("position", [(1.0, 0.5, 0.1), (0.45, 0.5, 0.02), (-0.469, 0.5, 1.2)])
def test_out_of_reach_is_reported(position: tuple[float, float, float]) -> None:
    assert not KINEMATICS.solve("left", position).reached


def test_bad_positions_are_rejected() -> None:
    with pytest.raises(ValueError, match="finite"):
        KINEMATICS.solve("left", (0.0, np.nan, 0.1))
    with pytest.raises(ValueError, match="three"):
        KINEMATICS.solve("left", (0.0, 0.1))
