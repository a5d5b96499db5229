"""The checkpoints that a training writes, with their model cards."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from pi05_lab.files import atomic_folder
from pi05_lab.training.config import TrainConfig
from pi05_lab.training.lora import split_state
from pi05_lab.training.metrics import LOG_FILE, format_figure, read_log
from pi05_lab.training.processing import DataProcessor, rename_map
from pi05_lab.training.state import Position
from pi05_ros import __version__
from pi05_ros.policy.adapters import write_adapters
from pi05_ros.policy.bundle import SETTINGS_FILE
from pi05_ros.policy.checkpoint import checkpoint_folder, save_weights, write_config
from pi05_ros.policy.next_token import ACTION_TOKENIZER
from pi05_ros.policy.processing import write_processing
from pi05_ros.policy.robots import NAMED
from pi05_ros.policy.weights import CheckpointError

CONFIG_FILE = "train_config.yaml"
CARD_FILE = "README.md"


def save_checkpoint(
    directory: Path,
    weights: Mapping[str, Tensor],
    processor: DataProcessor,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Path | None = None,
) -> None:
    """Write a network and all that it was trained with; the folder is replaced at once.

    Args:
        directory: of the checkpoint.
        weights: the network's state dict, with adapters where it has them.
        processor: of its data.
        config: of the training.
        position: its progress.
        counts: of the data, for the model card.
        log: the training's, which is copied.
    """
    precision = getattr(torch, config.save_precision)
    whole, learnt = split_state(weights, config.lora)
    settings = json.dumps(_settings(config, processor, position), indent=2) + "\n"
    with atomic_folder(directory, replace=True) as partial:
        if config.lora is not None and not config.lora.merge:
            lora = config.lora
            write_adapters(partial, _base(config), lora.rank, lora.alpha, learnt)
            write_config(processor.config, partial, precision)
        else:
            save_weights(processor.config, whole, partial, precision)
        if processor.language is not None:
            processor.language.tokenizer.save(partial / ACTION_TOKENIZER)
        for name, content in processor.tokenizer_files.items():
            (partial / name).write_bytes(content)
        write_processing(
            partial,
            processor.config,
            processor.statistics,
            ".",
            rename=rename_map(config.data.rename),
            delta_mask=processor.robot.delta_mask,
        )
        (partial / SETTINGS_FILE).write_text(settings, encoding="utf-8")
        write_yaml(partial, config)
        if log is not None:
            shutil.copyfile(log, partial / LOG_FILE)
        entries = read_log(log) if log is not None else []
        count = sum(tensor.numel() for tensor in whole.values())
        card = make_card(count, processor, config, position, counts, entries)
        card.save(partial / CARD_FILE)
        for file in partial.glob("*.*"):
            file.chmod(0o644)  # safetensors writes for the owner only


def _base(config: TrainConfig) -> str:
    """The start checkpoint, as an adapter folder names it: a folder by its full path."""
    folder = Path(config.network.start).expanduser()
    return str(folder.resolve()) if folder.exists() else config.network.start


def write_yaml(directory: Path, config: TrainConfig) -> None:
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
        **({} if any(stage.losses.get("flow") for stage in config.stages) else {"head": "fast"}),
        "note": config.note or steps,
    }


def make_card(
    parameters: int,
    processor: DataProcessor,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
) -> ModelCard:
    """The model card: the network, its data and all figures."""
    policy = processor.config
    rows = {
        "parameters": f"{parameters / 1e6:.2f} M, stored in {config.save_precision}",
        "started from": config.network.start,
        "images": f"{counts.get('images', 0)} samples of {len(policy.cameras)} cameras, "
        f"{policy.image_size} px",
        "labelled frames": counts.get("frames", 0),
        "held out": f"{counts.get('held_out_images', 0)} samples",
        "horizon": f"{policy.horizon} steps",
        "trained for": f"{position.total_s / 60:.1f} min, {position.total_steps} steps",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads, device "
        f"{config.device}",
        "software": f"pi05_ros {__version__}, torch {torch.__version__}",
    }
    lines = [
        f"# {policy.name} for {config.robot}",
        config.note or "Trained by `pi05 train`.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        *(["## Taken from the start", processor.origin] if processor.origin else []),
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
    try:
        readme = checkpoint_folder(start) / CARD_FILE
        theirs = ModelCard.load(readme, ignore_metadata_errors=True).data
    except (CheckpointError, OSError, ValueError, yaml.YAMLError):  # scratch, or no model's card
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: theirs[key] for key in keys if theirs.get(key)}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = dict.fromkeys(key for row in rows for key in row)
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[format_figure(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else "none yet"
