"""The state of a training, from which a killed one goes on with the same results."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pi05_lab.training.config import ConfigError, TrainConfig

STATE_FILE = "training_state.pt"
# Changes that leave a state usable, and what follows them reproducible.
_FREE = (
    "accelerate",
    "checkpoint_steps",
    "device",
    "evaluation",
    "log_steps",
    "note",
    "output",
    "save_precision",
    "tensorboard",
    "threads",
    "validation",
)


@dataclass
class Position:
    """Where a training is."""

    stage: int = 0
    step: int = 0
    """Steps done in the stage."""
    total_steps: int = 0
    stage_s: float = 0.0
    """Time spent in the stage's steps."""
    total_s: float = 0.0
    evaluated_s: float = 0.0
    """`total_s` at the latest closed-loop evaluation."""
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    """Finished stage → its figures."""


def save_state(
    directory: Path, config: TrainConfig, position: Position, parts: dict[str, Any]
) -> None:
    """Write the state; the file is replaced whole or not at all.

    Args:
        directory: an existing folder.
        config: what is being trained.
        position: where it is.
        parts: state dicts by name.
    """
    partial = directory / (STATE_FILE + ".partial")
    document = {"config": config.to_dict(), "position": asdict(position), "parts": parts}
    with partial.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / STATE_FILE)


def has_state(directory: Path) -> bool:
    return (directory / STATE_FILE).is_file()


def load_state(directory: Path, config: TrainConfig) -> tuple[Position, dict[str, Any]]:
    """Read the state that a training of this configuration left.

    Raises:
        ConfigError: no state, a damaged one, or one of another configuration.
    """
    path = directory / STATE_FILE
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no {STATE_FILE} to go on from") from None
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise ConfigError(f"{path} is damaged ({error}): remove {directory}") from None
    theirs, ours = document["config"], config.to_dict()
    for key in sorted(set(theirs) | set(ours)):
        if key not in _FREE and theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"{path} is of a training with another {key}: {theirs.get(key)} instead of "
                f"{ours.get(key)}; change it back or give another output"
            )
    return Position(**document["position"]), document["parts"]
