"""The one place where mujoco is imported, so that its absence reads the same everywhere."""

from __future__ import annotations

import os

try:
    import mujoco
except ModuleNotFoundError as error:
    raise ImportError(
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

__all__ = ["mujoco"]
