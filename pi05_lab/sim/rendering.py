"""Draws the simulated ALOHA's cameras, off screen and in a thread of its own.

Software rendering (Mesa llvmpipe) is what sets the frame rate on a machine without a GPU, so the
policy's pictures ("fast") have no shadows, no multisampling and no textures. `LP_NUM_THREADS` in
the environment limits the cores that Mesa takes.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pi05_lab.sim.engine import mujoco

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
"""The policy's cameras, by ALOHA's names."""
SCENE_CAMERA = "scene"
"""A third-person view for people."""

_MJCF_NAMES = {
    "cam_left_wrist": "left_wrist_camera",
    "cam_right_wrist": "right_wrist_camera",
}

Quality = Literal["fast", "pretty"]
_SHADOW_SIZE_PX = {"fast": 0, "pretty": 2048}
_SAMPLES = {"fast": 0, "pretty": 4}


def mjcf_name(camera: str) -> str:
    """A camera's name in the MJCF files.

    Raises:
        ValueError: it is neither one of `CAMERAS` nor "scene".
    """
    if camera not in (*CAMERAS, SCENE_CAMERA):
        raise ValueError(f"camera must be one of {(*CAMERAS, SCENE_CAMERA)}, got {camera!r}")
    return _MJCF_NAMES.get(camera, camera)


class RenderingUnavailable(RuntimeError):
    """No OpenGL works here without a screen."""


class CameraRenderer:
    """Draws any camera of one model; belongs to the thread that made it.

    It draws from its own copy of the model and its own MjData, so physics may go on in another
    thread meanwhile: drawing releases Python's global lock.

    Args:
        model: the scene, `SimulatedAloha.model`.
        width: of the pictures, pixels.
        height: of the pictures, pixels.
        quality: "fast" for a policy, "pretty" (shadows, smooth edges) for people.

    Raises:
        RenderingUnavailable: no OpenGL; the message names the packages.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        width: int = 640,
        height: int = 480,
        quality: Quality = "fast",
    ) -> None:
        if quality not in _SAMPLES:
            raise ValueError(f"quality must be one of {sorted(_SAMPLES)}, got {quality!r}")
        if width < 1 or height < 1:
            raise ValueError(f"a picture needs at least 1×1 pixels, got {width}×{height}")
        self.width, self.height = width, height
        self._thread = threading.get_ident()
        self._model = copy.copy(model)
        self._model.vis.global_.offwidth, self._model.vis.global_.offheight = width, height
        self._model.vis.quality.shadowsize = _SHADOW_SIZE_PX[quality]
        self._model.vis.quality.offsamples = _SAMPLES[quality]
        self._data = mujoco.MjData(self._model)
        self._gl, self._context = _open_context(self._model, width, height)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(self._model, maxgeom=4 * self._model.ngeom)
        flags = mujoco.mjtRndFlag
        self._scene.flags[flags.mjRND_SHADOW] = quality == "pretty"
        for flag in (flags.mjRND_REFLECTION, flags.mjRND_HAZE, flags.mjRND_FOG):
            self._scene.flags[flag] = False
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = [1, 0, 0, 0, 0, 0]
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        # OpenGL's first row is the lowest.
        self._upside_down = np.empty((height, width, 3), np.uint8)

    def render(self, state: mujoco.MjData | NDArray[np.float64], camera: str) -> NDArray[np.uint8]:
        """Draw one picture.

        Args:
            state: `qpos` [nq], or an MjData that nobody steps meanwhile.
            camera: one of `CAMERAS`, or "scene".

        Returns:
            [height, width, 3] RGB.

        Raises:
            RuntimeError: the renderer is closed or belongs to another thread.
            ValueError: no such camera, or a qpos of another scene.
        """
        if self._context is None:
            raise RuntimeError("this renderer is closed")
        if threading.get_ident() != self._thread:
            raise RuntimeError("a renderer draws only in the thread that made it; make one here")
        index = self._model.camera(mjcf_name(camera)).id
        qpos = np.asarray(getattr(state, "qpos", state), dtype=np.float64)
        if qpos.shape != (self._model.nq,):
            raise ValueError(f"qpos must have shape ({self._model.nq},), got {qpos.shape}")
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        self._camera.fixedcamid = index
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._options,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._upside_down, None, self._viewport, self._context)
        return np.ascontiguousarray(self._upside_down[::-1])

    def close(self) -> None:
        """Give the OpenGL context back; call it in the thread that made the renderer."""
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
    backend = os.environ.get("MUJOCO_GL", "").lower() or (
        "egl" if sys.platform.startswith("linux") else "default"
    )
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
            f"The cameras need OpenGL, and its {backend!r} back end does not work here ({error}). "
            "On Debian or Ubuntu: apt-get install -y libegl1 libgl1-mesa-dri libgl1 libosmesa6. "
            "MUJOCO_GL=osmesa chooses the other software renderer."
        ) from error
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    return gl, context
