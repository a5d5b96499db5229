"""The state from which a training resumes, by PyTorch's distributed checkpoint.

Every process writes its own part, and any number of processes reads it. A state is a folder that
appears at once when it is complete; the one before it is removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.processes import Processes

STATES = "states"
"""Folder of the states in a training's output."""
POSITION_FILE = "position.json"
CHANGEABLE = {"accelerate", "checkpoint_steps", "device", "ema_device", "evaluation",
              "gradient_checkpointing", "log_steps", "note", "output", "save", "save_precision",
              "threads", "trackers", "validation"}  # fmt: skip
"""Keys that may change between a state and its continuation."""
CHANGEABLE_DATA = {"workers", "cache_gb", "disk_gb"}
CHANGEABLE_STAGE = {"accumulate"}


@dataclass
class Position:
    """Progress of a training."""

    stage: int = 0
    step: int = 0
    """Steps done in the stage."""
    total_steps: int = 0
    stage_s: float = 0.0
    """Time spent in the stage's steps."""
    total_s: float = 0.0
    evaluated_s: float = 0.0
    """`total_s` at the latest closed-loop evaluation."""
    best: float | None = None
    """The lowest `save.best` so far."""
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    """Finished stage → its figures."""


def has_state(output: Path) -> bool:
    """Whether a training's output has a complete state."""
    return _latest(output) is not None


def _latest(output: Path) -> Path | None:
    folders = [p.parent for p in (output / STATES).glob(f"[0-9]*/{POSITION_FILE}")]
    return max(folders, default=None)


def save_state(
    output: Path,
    config: TrainConfig,
    position: Position,
    tensors: Mapping[str, Any],
    processes: Processes,
) -> None:
    """Write the state; called by all processes, which wait for each other.

    Raises:
        ConfigError: it cannot be written, for a full disk for example; the one before it stays.
    """
    folder = output / STATES
    # a stage's end has the same number of steps as its last state
    name = f"{position.total_steps:09d}.{position.stage:03d}"
    partial, final = folder / f"partial-{name}", folder / name
    if processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    try:
        with _alone(processes) as alone:
            dcp.save(dict(tensors), checkpoint_id=partial, no_dist=alone)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(f"the state cannot be written to {folder}: {_reason(error)}") from None
    if processes.is_main:
        document = {"config": config.to_dict(), "position": asdict(position)}
        with (partial / POSITION_FILE).open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for other in folder.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)
    processes.wait()


def read_position(output: Path, config: TrainConfig) -> tuple[Position, Path]:
    """The progress of a training with this configuration, and the folder of its tensors.

    Raises:
        ConfigError: no state, a damaged one, or one of another configuration.
    """
    folder = _latest(output)
    if folder is None:
        raise ConfigError(f"{output} has no state to resume from")
    path = folder / POSITION_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        theirs, position = document["config"], Position(**document["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove {output}") from None
    begun = position.stage + (position.step > 0)
    _check_config(path, theirs, config.to_dict(), begun)
    return position, folder


def read_tensors(folder: Path, tensors: dict[str, Any], processes: Processes) -> None:
    """Load a state's tensors into tensors of the same names and shapes, in place.

    Names that the state lacks are left alone: optimisers have no state of a parameter that no loss
    has reached.

    Raises:
        ConfigError: damaged files.
    """
    try:
        with _alone(processes) as alone:
            planner = DefaultLoadPlanner(allow_partial_load=True)
            dcp.load(tensors, checkpoint_id=folder, planner=planner, no_dist=alone)
    except (Exception, CheckpointException) as error:  # the type depends on the damage
        raise ConfigError(f"{folder} is damaged ({_reason(error)}): remove it") from None


def _reason(error: BaseException) -> str:
    """The first process's error in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _alone(processes: Processes) -> Iterator[bool]:
    """Whether this is the only process, without PyTorch's warning of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield processes.count == 1


def _check_config(
    path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], begun: int
) -> None:
    """Raise ConfigError for a key that changed and decides what is learnt; `begun` stages count."""
    for key in sorted((set(theirs) | set(ours)) - CHANGEABLE):
        old, new = theirs.get(key), ours.get(key)
        if key == "data" and isinstance(old, dict) and isinstance(new, dict):
            old, new = _without(old, CHANGEABLE_DATA), _without(new, CHANGEABLE_DATA)
        if key == "stages" and isinstance(old, list) and isinstance(new, list):
            # stages that have not begun may be changed, added or left out
            old = [_without(stage, CHANGEABLE_STAGE) for stage in old[:begun]]
            new = [_without(stage, CHANGEABLE_STAGE) for stage in new[:begun]]
        for name, before, now in _differences(key, old, new):
            raise ConfigError(
                f"{path} is of a training with another {name}: {before} instead of {now}; change "
                "it back or give another output"
            )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys as `--set` takes them, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{name}.{index}", before, now)
    elif old != new:
        yield name, old, new


def _without(values: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
