"""Renders the simulated ALOHA's cameras off screen, and finds the cubes in their images.

Software rendering (Mesa llvmpipe) limits the frame rate on a machine without a GPU, so the policy's
images ("fast") have no shadows, no multisampling and no textures. The environment variable
`LP_NUM_THREADS` limits the cores that Mesa uses. `mujoco.Renderer` is not used: its OpenGL back end
is fixed when mujoco is imported, and the simulator must also run where there is no OpenGL.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.scene import CUBE_HALF_SIZE_M, mujoco
from pi05_ros.types import FloatArray

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
"""The policy's cameras, by ALOHA's names."""
SCENE_CAMERA = "scene"
"""A third-person view for people."""

_MJCF_NAMES = {"cam_left_wrist": "left_wrist_camera", "cam_right_wrist": "right_wrist_camera"}

Quality = Literal["fast", "pretty"]
_DRAWN_GROUPS = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)

ABSENT = -1.0
"""Both coordinates of a cube that is outside the image or hidden."""
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
# A little inside, so that a corner's ray does not miss its own cube by rounding.
_POINTS_M = np.concatenate([np.zeros((1, 3)), 0.9 * CUBE_HALF_SIZE_M * _CORNERS])
_LEAST_SEEN = 2
"""Least visible points of the centre and the corners; one corner does not locate a cube."""


def mjcf_name(camera: str) -> str:
    """The name in the MJCF files of one of `CAMERAS` or "scene"; ValueError for another."""
    if camera not in (*CAMERAS, SCENE_CAMERA):
        raise ValueError(f"camera must be one of {(*CAMERAS, SCENE_CAMERA)}, got {camera!r}")
    return _MJCF_NAMES.get(camera, camera)


class RenderingUnavailable(RuntimeError):
    """No off-screen OpenGL on this machine."""


class CameraRenderer:
    """Renders any camera of one model, of `width` × `height` pixels.

    Used only in the thread that made it. It has its own copy of the model and its own MjData, so
    physics may run in another thread: rendering releases Python's global lock. `quality` is "fast"
    for a policy, "pretty" (shadows, smooth edges) for people.
    """

    def __init__(
        self, model: mujoco.MjModel, width: int = 640, height: int = 480, quality: Quality = "fast"
    ) -> None:
        if quality not in ("fast", "pretty"):
            raise ValueError(f"quality must be one of ['fast', 'pretty'], got {quality!r}")
        if width < 1 or height < 1:
            raise ValueError(f"an image needs at least 1×1 pixels, got {width}×{height}")
        pretty = quality == "pretty"
        self._thread = threading.get_ident()
        self._model = copy.copy(model)
        self._model.vis.global_.offwidth, self._model.vis.global_.offheight = width, height
        self._model.vis.quality.shadowsize = 2048 if pretty else 0
        self._model.vis.quality.offsamples = 4 if pretty else 0
        self._data = mujoco.MjData(self._model)
        self._gl, self._context = _open_context(self._model, width, height)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(self._model, maxgeom=4 * self._model.ngeom)
        flags = mujoco.mjtRndFlag
        self._scene.flags[flags.mjRND_SHADOW] = pretty
        for flag in (flags.mjRND_REFLECTION, flags.mjRND_HAZE, flags.mjRND_FOG):
            self._scene.flags[flag] = False
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = _DRAWN_GROUPS
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        # OpenGL's first row is the lowest.
        self._upside_down = np.empty((height, width, 3), np.uint8)

    def render(self, state: mujoco.MjData | NDArray[np.float64], camera: str) -> NDArray[np.uint8]:
        """RGB [height, width, 3] of one of `CAMERAS`, or "scene".

        `state` is `qpos` [nq], or an MjData that is not stepped meanwhile. RuntimeError if the
        renderer is closed or belongs to another thread.
        """
        if self._context is None:
            raise RuntimeError("this renderer is closed")
        if threading.get_ident() != self._thread:
            raise RuntimeError("a renderer works only in the thread that made it")
        self._camera.fixedcamid = self._model.camera(mjcf_name(camera)).id
        qpos = np.asarray(getattr(state, "qpos", state), dtype=np.float64)
        if qpos.shape != (self._model.nq,):
            raise ValueError(f"qpos must have shape ({self._model.nq},), got {qpos.shape}")
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        self._gl.make_current()
        view = (self._options, self._perturbation, self._camera, mujoco.mjtCatBit.mjCAT_ALL)
        mujoco.mjv_updateScene(self._model, self._data, *view, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._upside_down, None, self._viewport, self._context)
        return np.ascontiguousarray(self._upside_down[::-1])

    def close(self) -> None:
        """Free the OpenGL context; call it in the thread that made the renderer."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None

    def __enter__(self) -> CameraRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_context(model: mujoco.MjModel, width: int, height: int) -> tuple[Any, Any]:
    default = "egl" if sys.platform.startswith("linux") else "default"
    backend = os.environ.get("MUJOCO_GL", "").lower() or default
    try:
        if backend == "egl":
            from mujoco.egl import GLContext
        elif backend == "osmesa":
            from mujoco.osmesa import GLContext
        else:
            from mujoco import GLContext
        gl = GLContext(width, height)
        gl.make_current()
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
    except (ImportError, AttributeError, OSError, RuntimeError, mujoco.FatalError) as error:
        # PyOpenGL reports a missing library as an AttributeError on None.
        raise RenderingUnavailable(
            f"the cameras need OpenGL, whose {backend!r} back end does not work here ({error}). "
            "On Debian or Ubuntu: apt-get install -y libegl1 libgl1-mesa-dri libgl1 libosmesa6. "
            "MUJOCO_GL=osmesa chooses the other software renderer."
        ) from error
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    return gl, context


def cube_pixels(sim: SimulatedAloha, camera: str, aspect: float = 4 / 3) -> FloatArray:
    """[cubes, 2] column and row of the visible part's middle, from 0 to 1 over the image.

    0, 0 is the upper left corner. An invisible cube has `ABSENT` twice. `aspect` is the image's
    width over its height.
    """
    model, data = sim.model, sim.data
    mujoco.mj_camlight(model, data)
    index = model.camera(mjcf_name(camera)).id
    origin, axes = data.cam_xpos[index], data.cam_xmat[index].reshape(3, 3)
    half_height = np.tan(np.radians(model.cam_fovy[index]) / 2)
    half = np.array([half_height * aspect, -half_height])
    result = np.full((len(sim.cubes), 2), ABSENT)
    geom = np.empty(1, dtype=np.int32)
    for row, cube in enumerate(sim.cubes):
        body = data.body(f"{cube}_cube")
        points = body.xpos + _POINTS_M @ body.xmat.reshape(3, 3).T
        local = (points - origin) @ axes
        depth = -local[:, 2]
        ahead = depth > 0
        places = 0.5 + local[:, :2] / np.where(ahead, depth, 1.0)[:, None] / (2 * half)
        seen = []
        for k in np.flatnonzero(ahead & ((places >= 0) & (places <= 1)).all(axis=1)):
            # the first drawn geometry on the ray, -1 if there is none
            mujoco.mj_ray(model, data, origin, points[k] - origin, _DRAWN_GROUPS, 1, -1, geom)
            if geom[0] >= 0 and model.geom_bodyid[geom[0]] == body.id:
                seen.append(k)
        if len(seen) >= _LEAST_SEEN:
            result[row] = places[seen].mean(axis=0)
    return result
