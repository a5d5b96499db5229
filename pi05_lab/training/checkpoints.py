"""What a training saves: the state to resume from, and the checkpoint with its model card.

The state is one file, replaced atomically; a resumed training ends with the same bits.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from pi05_lab.files import atomic_file, atomic_folder
from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.metrics import LOG_FILE, read_log
from pi05_lab.training.processing import DataProcessor
from pi05_ros import __version__
from pi05_ros.policy import processing as processors
from pi05_ros.policy.bundle import SETTINGS_FILE
from pi05_ros.policy.checkpoint import save_model
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.robots import NAMED

CONFIG_FILE = "train_config.yaml"
CARD_FILE = "README.md"
STATE_FILE = "training_state.pt"
# Keys that may change between a state and its continuation.
_CHANGEABLE = (
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
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    """Finished stage → its figures."""


def save_state(
    directory: Path, config: TrainConfig, position: Position, parts: dict[str, Any]
) -> None:
    """Write the state.

    Args:
        directory: an existing folder.
        config: of the training.
        position: its progress.
        parts: state dicts by name.
    """
    document = {"config": config.to_dict(), "position": asdict(position), "parts": parts}
    with atomic_file(directory / STATE_FILE) as path, path.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())


def has_state(directory: Path) -> bool:
    return (directory / STATE_FILE).is_file()


def load_state(directory: Path, config: TrainConfig) -> tuple[Position, dict[str, Any]]:
    """Read the state of a training with this configuration.

    Raises:
        ConfigError: no state, a damaged one, or one of another configuration.
    """
    path = directory / STATE_FILE
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no {STATE_FILE} to resume from") from None
    except Exception as error:  # the type depends on the damage
        raise ConfigError(f"{path} is damaged ({error}): remove {directory}") from None
    theirs, ours = document["config"], config.to_dict()
    for key in sorted(set(theirs) | set(ours)):
        if key not in _CHANGEABLE and theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"{path} is of a training with another {key}: {theirs.get(key)} instead of "
                f"{ours.get(key)}; change it back or give another output"
            )
    return Position(**document["position"]), document["parts"]


def save_checkpoint(
    directory: Path,
    network: Pi0,
    processor: DataProcessor,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Path | None,
) -> None:
    """Write the checkpoint; the folder is replaced at once.

    Args:
        directory: of the checkpoint.
        network: with the weights to save, in float32.
        processor: its tokenizer and statistics.
        config: of the training, written beside the weights.
        position: progress of the training.
        counts: of the data, for the model card.
        log: the training's log, copied into the folder.
    """
    with atomic_folder(directory, replace=True) as partial:
        save_model(_stored(network, config.save_precision), partial)
        for name, content in processor.tokenizer_files.items():
            (partial / name).write_bytes(content)
        processors.write_processing(
            partial,
            processor.config,
            processor.statistics,
            tokenizer=".",
            delta_mask=processor.robot.delta_mask,
        )
        settings = json.dumps(_settings(config, processor, position), indent=2) + "\n"
        (partial / SETTINGS_FILE).write_text(settings, encoding="utf-8")
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        entries = []
        if log is not None and log.is_file():
            shutil.copyfile(log, partial / LOG_FILE)
            entries = read_log(log)
        card = model_card(network, config, position, counts, entries)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only


def _stored(network: Pi0, precision: str) -> Pi0:
    """A copy in the dtypes that a file of this precision has."""
    stored = copy.deepcopy(network)
    for name, parameter in stored.named_parameters():
        parameter.data = parameter.data.to(stored.parameter_dtype(name, getattr(torch, precision)))
    return stored


def _settings(config: TrainConfig, processor: DataProcessor, position: Position) -> dict[str, Any]:
    minutes = position.total_s / 60
    note = config.note or f"{position.total_steps} steps in {minutes:.0f} min, seed {config.seed}"
    settings: dict[str, Any] = {"robot": processor.robot.name}
    # A built-in robot's open settings follow the checkpoint's origin at loading. A robot's YAML
    # description is complete, unless the training adds to it.
    for key in ("adapt_to_pi", "delta_actions"):
        value = getattr(config, key)
        if config.robot in NAMED or value:
            settings[key] = value
    return settings | {"dt_s": processor.robot.dt_s, "trained": True, "note": note}


def model_card(
    network: Pi0,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
) -> str:
    """The model card: the network, its data and all figures."""
    count = sum(parameter.numel() for parameter in network.parameters())
    name = "π0.5" if network.config.kind == "pi05" else "π0"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: pi05_ros",
        "pipeline_tag: robotics",
        "---",
        "",
        f"# {name} for {config.robot}",
        "",
        config.note or "Trained by `pi05 train`.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {count / 1e6:.2f} M, stored in {config.save_precision} |",
        f"| started from | {config.network.start} |",
        f"| images | {counts.get('images', 0)} samples of {len(network.config.cameras)} "
        f"cameras, {network.config.image_size} px |",
        f"| labelled frames | {counts.get('frames', 0)} |",
        f"| held out | {counts.get('held_out_images', 0)} samples |",
        f"| horizon | {network.config.horizon} steps |",
        f"| trained for | {position.total_s / 60:.1f} min, {position.total_steps} steps |",
        f"| machine | {platform.machine()}, {torch.get_num_threads()} CPU threads, device "
        f"{config.device} |",
        f"| software | pi05_ros {__version__}, torch {torch.__version__} |",
        "",
        "## Stages",
        "",
        *_table([{"stage": name, **figures} for name, figures in position.summary.items()]),
    ]
    for kind, title in (("validation", "Held-out episodes"), ("evaluation", "Closed loop")):
        entries = [entry for entry in log if entry.get("kind") == kind]
        if entries:
            figures = {k: v for k, v in entries[-1].items() if k not in ("kind", "time_s")}
            lines += ["", f"## {title}", "", *_table([figures])]
    lines += [
        "",
        "## To repeat",
        "",
        f"`pi05 train {CONFIG_FILE}` with this folder's configuration, on its datasets:",
        "",
        *(f"- `{dataset.root}`" for dataset in config.data.datasets),
        "",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["none yet"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = (_cell(row.get(column, "")) for column in columns)
        text.append(f"| {' | '.join(cells)} |")
    return text


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
