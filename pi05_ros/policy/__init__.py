"""π0.5 and π0: an observation becomes a chunk of actions.

The names below are loaded on first use, so that one file of this room can be imported without the
dependencies of the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi05_ros.policy.checkpoint import load_model, save_model
    from pi05_ros.policy.config import PolicyConfig, read_config
    from pi05_ros.policy.model import Pi0
    from pi05_ros.policy.policy import Policy
    from pi05_ros.policy.weights import CheckpointError

__all__ = [
    "CheckpointError",
    "Pi0",
    "Policy",
    "PolicyConfig",
    "load_model",
    "read_config",
    "save_model",
]

_HOMES = {
    "CheckpointError": "weights",
    "Pi0": "model",
    "Policy": "policy",
    "PolicyConfig": "config",
    "load_model": "checkpoint",
    "read_config": "config",
    "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
