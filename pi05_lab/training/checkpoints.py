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
from huggingface_hub import ModelCard, ModelCardData

from pi05_lab.files import atomic_file, atomic_folder
from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.metrics import LOG_FILE, format_figure, read_log
from pi05_lab.training.processing import DataProcessor
from pi05_ros import __version__
from pi05_ros.policy.bundle import SETTINGS_FILE
from pi05_ros.policy.checkpoint import save_model
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.processing import write_processing
from pi05_ros.policy.robots import NAMED

CONFIG_FILE = "train_config.yaml"
CARD_FILE = "README.md"
STATE_FILE = "training_state.pt"
CHANGEABLE = {"accelerate", "checkpoint_steps", "device", "evaluation", "log_steps", "note",
              "output", "save_precision", "tensorboard", "threads", "validation"}  # fmt: skip
"""Keys that may change between a state and its continuation."""


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
    """Write the state; `parts` are state dicts by name."""
    document = {"config": config.to_dict(), "position": asdict(position), "parts": parts}
    with atomic_file(directory / STATE_FILE) as path, path.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())


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
        if key not in CHANGEABLE and theirs.get(key) != ours.get(key):
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
    log: Path | None = None,
) -> None:
    """Write the network and all that it was trained with; the folder is replaced at once.

    `counts` are of the data, for the model card; the training's `log` is copied.
    """
    stored = copy.deepcopy(network)
    precision = getattr(torch, config.save_precision)
    for name, parameter in stored.named_parameters():
        parameter.data = parameter.data.to(stored.parameter_dtype(name, precision))
    settings = json.dumps(_settings(config, processor, position), indent=2) + "\n"
    with atomic_folder(directory, replace=True) as partial:
        save_model(stored, partial)
        for name, content in processor.tokenizer_files.items():
            (partial / name).write_bytes(content)
        mask = processor.robot.delta_mask
        write_processing(partial, processor.config, processor.statistics, ".", delta_mask=mask)
        (partial / SETTINGS_FILE).write_text(settings, encoding="utf-8")
        write_config(partial, config)
        if log is not None:
            shutil.copyfile(log, partial / LOG_FILE)
        entries = read_log(log) if log is not None else []
        make_card(network, config, position, counts, entries).save(partial / CARD_FILE)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only


def write_config(directory: Path, config: TrainConfig) -> None:
    """Write the configuration as the YAML file that repeats the training."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _settings(config: TrainConfig, processor: DataProcessor, position: Position) -> dict[str, Any]:
    minutes = position.total_s / 60
    steps = f"{position.total_steps} steps in {minutes:.0f} min, seed {config.seed}"
    units = {"adapt_to_pi": config.adapt_to_pi, "delta_actions": config.delta_actions}
    # A built-in robot's open settings follow the checkpoint's origin at loading. A robot's YAML
    # description is complete, unless the training adds to it.
    return {
        "robot": processor.robot.name,
        **{key: value for key, value in units.items() if config.robot in NAMED or value},
        "dt_s": processor.robot.dt_s,
        "trained": True,
        "note": config.note or steps,
    }


def make_card(
    network: Pi0,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
) -> ModelCard:
    """The model card: the network, its data and all figures."""
    count = sum(parameter.numel() for parameter in network.parameters())
    rows = {
        "parameters": f"{count / 1e6:.2f} M, stored in {config.save_precision}",
        "started from": config.network.start,
        "images": f"{counts.get('images', 0)} samples of {len(network.config.cameras)} cameras, "
        f"{network.config.image_size} px",
        "labelled frames": counts.get("frames", 0),
        "held out": f"{counts.get('held_out_images', 0)} samples",
        "horizon": f"{network.config.horizon} steps",
        "trained for": f"{position.total_s / 60:.1f} min, {position.total_steps} steps",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads, device "
        f"{config.device}",
        "software": f"pi05_ros {__version__}, torch {torch.__version__}",
    }
    lines = [
        f"# {'π0.5' if network.config.kind == 'pi05' else 'π0'} for {config.robot}",
        config.note or "Trained by `pi05 train`.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        "## Stages",
        _table([{"stage": name, **figures} for name, figures in position.summary.items()]),
    ]
    for kind, title in (("validation", "Held-out episodes"), ("evaluation", "Closed loop")):
        entries = [entry for entry in log if entry["kind"] == kind]
        if entries:
            figures = {k: v for k, v in entries[-1].items() if k not in ("kind", "time_s")}
            lines += [f"## {title}", _table([figures])]
    lines += [
        "## To repeat",
        f"`pi05 train {CONFIG_FILE}` with this folder's configuration, on its datasets:",
        "\n".join(f"- `{dataset.root}`" for dataset in config.data.datasets),
    ]
    data = ModelCardData(
        library_name="pi05_ros", pipeline_tag="robotics", **_licence(config.network.start)
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


def _licence(start: str) -> dict[str, Any]:
    """The licence that the start checkpoint's model card names: its fine-tune has the same."""
    readme = Path(start).expanduser() / CARD_FILE
    if start == "scratch" or not readme.is_file():
        return {}
    try:
        theirs = ModelCard.load(readme, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # no card of a model
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: theirs[key] for key in keys if theirs.get(key)}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = dict.fromkeys(key for row in rows for key in row)
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[format_figure(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else "none yet"
