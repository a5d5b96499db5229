"""A training's result: the folder that `Policy.from_pretrained` loads, with its model card."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from pi05_lab.training.config import TrainConfig
from pi05_lab.training.journal import LOG_FILE, read_log
from pi05_lab.training.preparation import DataProcessor, copy_tokenizer
from pi05_lab.training.state import Position
from pi05_ros import __version__
from pi05_ros.policy import processing as processors
from pi05_ros.policy.checkpoint import save_model
from pi05_ros.policy.model import Pi0, parameter_dtype
from pi05_ros.policy.robots import NAMED, SETTINGS_FILE

CONFIG_FILE = "train_config.yaml"
CARD_FILE = "README.md"


def save_checkpoint(
    directory: Path,
    network: Pi0,
    preparation: DataProcessor,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Path | None,
) -> None:
    """Write the checkpoint; the folder is replaced whole.

    Args:
        directory: of the checkpoint.
        network: with the weights to ship, in float32.
        preparation: its tokenizer and statistics.
        config: the training's, written beside the weights.
        position: how far the training is.
        counts: of the data, for the model card.
        log: the training's log, copied into the folder.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}_", dir=directory.parent))
    try:
        save_model(_stored(network, config.save_precision), partial)
        copy_tokenizer(preparation, partial)
        processors.write_processing(
            partial,
            preparation.config,
            preparation.statistics,
            tokenizer=".",
            delta_mask=preparation.robot.delta_mask,
        )
        _write_json(partial / SETTINGS_FILE, _settings(config, preparation, position))
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        entries = []
        if log is not None and log.is_file():
            shutil.copyfile(log, partial / LOG_FILE)
            entries = read_log(log)
        card = model_card(network, config, position, counts, entries)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _stored(network: Pi0, precision: str) -> Pi0:
    """A copy in the dtypes that a file of this precision has."""
    stored = copy.deepcopy(network)
    for name, parameter in stored.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, getattr(torch, precision)))
    return stored


def _settings(
    config: TrainConfig, preparation: DataProcessor, position: Position
) -> dict[str, Any]:
    minutes = position.total_s / 60
    note = config.note or f"{position.total_steps} steps in {minutes:.0f} min, seed {config.seed}"
    settings: dict[str, Any] = {"robot": preparation.robot.name}
    # What a built-in robot leaves open follows the checkpoint's origin when it is loaded; a
    # description of one's own holds there as it does in training, unless the training adds to it.
    for key in ("adapt_to_pi", "delta_actions"):
        value = getattr(config, key)
        if config.robot in NAMED or value:
            settings[key] = value
    return settings | {"dt_s": preparation.robot.dt_s, "trained": True, "note": note}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def model_card(
    network: Pi0,
    config: TrainConfig,
    position: Position,
    counts: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
) -> str:
    """The model card: what it is, what it was trained on, and every figure measured."""
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
        f"| pictures | {counts.get('pictures', 0)} moments of {len(network.config.cameras)} "
        f"cameras, {network.config.image_size} px |",
        f"| labelled frames | {counts.get('frames', 0)} |",
        f"| held out | {counts.get('held_out_pictures', 0)} moments |",
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
        "## Again",
        "",
        f"`pi05 train {CONFIG_FILE}` with this folder's configuration, on the datasets it names:",
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
