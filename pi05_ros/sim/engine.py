"""The one place where mujoco is imported, so that its absence reads the same everywhere."""

from __future__ import annotations

try:
    import mujoco
except ImportError as error:
    raise ImportError(
        "The simulator needs mujoco, which is not installed: pip install 'pi05_ros[sim]'"
    ) from error

__all__ = ["mujoco"]
