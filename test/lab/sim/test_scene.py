"""Pins the model's shape: joint names and order, limits, who collides, complete assets."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from pi05_lab.sim.scene import (
    ARM_JOINTS,
    ASSETS,
    GRIPPER_CLOSED_M,
    GRIPPER_OPEN_M,
    JOINT_NAMES,
    build_model,
)


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return build_model()


def test_joint_names_are_alohas_in_alohas_order() -> None:
    assert len(JOINT_NAMES) == 14
    assert JOINT_NAMES[0] == "left_waist"
    assert JOINT_NAMES[5:8] == ("left_wrist_rotate", "left_gripper", "right_waist")
    assert JOINT_NAMES[13] == "right_gripper"


def test_arms_face_each_other_across_the_table(model: mujoco.MjModel) -> None:
    """A base placed or turned wrongly would move every image and every reach."""
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.body("left_base").xpos, [-0.469, 0.5, 0.0])
    np.testing.assert_allclose(data.body("right_base").xpos, [0.469, 0.5, 0.0])
    # At zero the upper arms point up and the forearms at the other arm.
    left, right = data.site("left_tool").xpos, data.site("right_tool").xpos
    np.testing.assert_allclose(left * [-1, 1, 1], right, atol=1e-9)
    reach = 0.05955 + 0.2 + 0.1 + 0.069744 + 0.15
    np.testing.assert_allclose(left, [-0.469 + reach, 0.5, 0.079 + 0.04805 + 0.3], atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_servos_take_the_joints_range(model: mujoco.MjModel, side: str) -> None:
    for joint in ARM_JOINTS:
        name = f"{side}_{joint}"
        np.testing.assert_allclose(model.actuator(name).ctrlrange, model.joint(name).range)
    np.testing.assert_allclose(
        model.actuator(f"{side}_left_finger").ctrlrange, [GRIPPER_CLOSED_M, GRIPPER_OPEN_M]
    )


def test_only_pads_cubes_and_table_collide(model: mujoco.MjModel) -> None:
    """Meshes that collide cost time and stop the arms at their own shells."""
    geoms = [i for i in range(model.ngeom) if model.geom_contype[i] or model.geom_conaffinity[i]]
    colliding = {model.body(int(model.geom_bodyid[i])).name for i in geoms}
    fingers = {f"{side}_{f}_finger_link" for side in ("left", "right") for f in ("left", "right")}
    assert colliding == {"table", "red_cube", "green_cube", "blue_cube", *fingers}


def test_pads_do_not_collide_with_each_other(model: mujoco.MjModel) -> None:
    pads = [i for i in range(model.ngeom) if model.geom_group[i] == 3]
    assert len(pads) == 8
    assert not any(model.geom_contype[a] & model.geom_conaffinity[b] for a in pads for b in pads)


def test_few_triangles(model: mujoco.MjModel) -> None:
    """Software rendering slows down if someone puts the full meshes back."""
    meshes = [int(model.geom_dataid[i]) for i in range(model.ngeom) if model.geom_dataid[i] >= 0]
    assert sum(int(model.mesh_facenum[mesh]) for mesh in meshes) < 12_000


def test_meshes_travel_with_their_licences() -> None:
    notice = (ASSETS / "NOTICE").read_text()
    assert "Apache License" in notice and "Copyright (c) 2023 Tony Z. Zhao" in notice
    assert "Apache License" in (ASSETS / "LICENSE-gym-aloha").read_text()


def test_cubes_are_a_choice() -> None:
    assert build_model(cubes=("yellow",)).nq == 16 + 7
    assert build_model(cubes=()).nq == 16


@pytest.mark.parametrize("cubes", [("pink",), ("red", "red")])
def test_wrong_cubes_are_named(cubes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=cubes[0]):
        build_model(cubes=cubes)
