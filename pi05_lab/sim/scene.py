"""Builds the MuJoCo model: two ViperX 300s arms face each other over a table with cubes.

World frame: x from the left arm to the right arm, y away from the person at the table, z up from
the table top; metres. `assets/scene.xml` and `assets/vx300s.xml` hold the arms, the table and the
cameras, and open in MuJoCo's viewer as they are; `assets/README.md` says where they come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

try:
    import mujoco
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The simulator needs mujoco, which is not installed: pip install 'pi05_ros[sim]'",
        name=error.name,
    ) from error
except (ImportError, AttributeError, OSError) as error:
    # mujoco loads the OpenGL library that MUJOCO_GL names at once; PyOpenGL reports a missing one
    # as an AttributeError on None.
    raise ImportError(
        f"mujoco cannot load the OpenGL of MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} "
        f"({error}). "
        "On Debian or Ubuntu: apt-get install -y libegl1 libgl1-mesa-dri libgl1, and leave "
        "MUJOCO_GL unset or egl; libosmesa6 is for MUJOCO_GL=osmesa."
    ) from error

ASSETS = Path(__file__).with_name("assets")

TIMESTEP_S = 0.005
"""One physics step."""

SIDES = ("left", "right")
ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINT_NAMES = tuple(f"{side}_{joint}" for side in SIDES for joint in (*ARM_JOINTS, "gripper"))
"""The 14 joints in ALOHA's order: six of the left arm, its gripper, then the right arm's."""

GRIPPER_CLOSED_M = 0.01844
GRIPPER_OPEN_M = 0.058
"""Finger positions that the ALOHA project calls 0 and 1 (gym-aloha `constants.py`, puppet)."""

CUBE_HALF_SIZE_M = 0.02
CUBE_MASS_KG = 0.05
CUBE_COLORS = {
    "red": (0.80, 0.05, 0.05, 1.0),
    "green": (0.05, 0.55, 0.12, 1.0),
    "blue": (0.06, 0.17, 0.80, 1.0),
    "yellow": (0.95, 0.75, 0.05, 1.0),
}


def build_model(cubes: Sequence[str] = ("red", "green", "blue")) -> mujoco.MjModel:
    """Compile the scene with one cube per colour in `cubes`."""
    unknown = [name for name in cubes if name not in CUBE_COLORS]
    if unknown or len(set(cubes)) != len(cubes):
        raise ValueError(f"cubes must be different names of {sorted(CUBE_COLORS)}, got {cubes!r}")
    spec = mujoco.MjSpec.from_file(str(ASSETS / "scene.xml"))
    spec.option.timestep = TIMESTEP_S
    for index, name in enumerate(cubes):
        body = spec.worldbody.add_body(
            name=f"{name}_cube", pos=[0.12 * index, 0.5, CUBE_HALF_SIZE_M]
        )
        body.add_freejoint(name=f"{name}_cube")
        # A solid cube has 1.3e-5 kg·m²; four times that damps its rattling between the pads.
        body.explicitinertial = True
        body.ipos, body.iquat = [0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]
        body.mass, body.inertia = CUBE_MASS_KG, [5e-5] * 3
        body.add_geom(
            name=f"{name}_cube",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[CUBE_HALF_SIZE_M] * 3,
            rgba=CUBE_COLORS[name],
            condim=4,
            friction=[1.5, 0.02, 0.0005],
            solimp=[0.95, 0.99, 0.001, 0.5, 2.0],
            solref=[0.01, 1.0],
            contype=2,
            conaffinity=3,
        )
    return spec.compile()
