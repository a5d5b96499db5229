"""Where in a camera's picture each cube is, as far as the camera sees it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.engine import mujoco
from pi05_lab.sim.rendering import mjcf_name
from pi05_lab.sim.scene import CUBE_HALF_SIZE_M

FloatArray = NDArray[np.float64]

ABSENT = -1.0
"""Both coordinates of a cube that is outside the picture or hidden."""

_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
# A little inside, so that a corner's ray does not miss its own cube by rounding.
_POINTS_M = np.concatenate([np.zeros((1, 3)), 0.9 * CUBE_HALF_SIZE_M * _CORNERS])
_LEAST_SEEN = 2
"""Of the centre and the corners; a single corner is not enough to say where a cube is."""
_DRAWN_GROUPS = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)


def cube_pixels(sim: SimulatedAloha, camera: str, aspect: float = 4 / 3) -> FloatArray:
    """[cubes, 2] column and row of the visible part's middle, from 0 to 1 over the picture.

    0, 0 is the upper left corner. A cube that is not seen has `ABSENT` twice.

    Args:
        sim: as it stands now.
        camera: one of `cameras.CAMERAS`.
        aspect: the picture's width over its height.

    Raises:
        ValueError: no such camera.
    """
    model, data = sim.model, sim.data
    mujoco.mj_camlight(model, data)
    index = model.camera(mjcf_name(camera)).id
    origin, axes = data.cam_xpos[index], data.cam_xmat[index].reshape(3, 3)
    half_height = np.tan(np.radians(model.cam_fovy[index]) / 2)
    half = np.array([half_height * aspect, -half_height])
    result = np.full((len(sim.cubes), 2), ABSENT)
    for row, cube in enumerate(sim.cubes):
        body = data.body(f"{cube}_cube")
        points = body.xpos + _POINTS_M @ body.xmat.reshape(3, 3).T
        local = (points - origin) @ axes
        depth = -local[:, 2]
        ahead = depth > 0
        places = 0.5 + local[:, :2] / np.where(ahead, depth, 1.0)[:, None] / (2 * half)
        inside = ahead & ((places >= 0) & (places <= 1)).all(axis=1)
        seen = [i for i in np.flatnonzero(inside) if _first_body(sim, origin, points[i]) == body.id]
        if len(seen) >= _LEAST_SEEN:
            result[row] = places[seen].mean(axis=0)
    return result


def _first_body(sim: SimulatedAloha, origin: FloatArray, point: FloatArray) -> int:
    """The body that a ray from `origin` through `point` meets first, of those that are drawn."""
    geom = np.full(1, -1, dtype=np.int32)
    mujoco.mj_ray(sim.model, sim.data, origin, point - origin, _DRAWN_GROUPS, 1, -1, geom)
    return int(sim.model.geom_bodyid[geom[0]]) if geom[0] >= 0 else -1
