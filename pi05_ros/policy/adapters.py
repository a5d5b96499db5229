"""Adapters of a fine-tuned checkpoint, merged into the network that it started from.

A folder with adapter_config.json and adapter_model.safetensors, as peft names them. The first names
the start checkpoint, the second has LoRA's two matrices (arXiv 2106.09685) beside each adapted one,
and the parameters that learnt whole; names are those of this package's network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi05_ros.policy.weights import CheckpointError, read_json, require_regular_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAMES = re.compile(r"(?P<matrix>.+)\.lora_(?P<side>[AB])\.weight")
PREFIX = "base_model.model."
"""Of every name in the file, as peft writes them."""


@dataclass(frozen=True)
class Adapters:
    """The content of an adapter folder."""

    base: str
    """Folder or Hugging Face id of the checkpoint that the training started from."""
    scale: float
    tensors: dict[str, Tensor]


def read_adapters(directory: Path) -> Adapters | None:
    """A folder's adapters; None for a folder with a whole network.

    Raises:
        CheckpointError: damaged files, or adapters of another kind.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    document = read_json(directory / ADAPTER_CONFIG)
    base, rank = document.get("base_model_name_or_path"), document.get("r")
    alpha = document.get("lora_alpha")
    if document.get("peft_type") != "LORA" or not isinstance(base, str):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} is not LoRA with a base checkpoint")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: r or lora_alpha is not a number")
    path = directory / ADAPTER_WEIGHTS
    require_regular_file(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return Adapters(base, alpha / rank, named)


def write_adapters(
    directory: Path, base: str, rank: int, alpha: float, tensors: Mapping[str, Tensor]
) -> None:
    """Write the two files into an existing folder."""
    targets = {
        match["matrix"].rpartition(".")[2]
        for match in map(ADAPTER_NAMES.fullmatch, tensors)
        if match is not None
    }
    document = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "bias": "none",
        "task_type": None,
    }
    text = json.dumps(document, indent=2) + "\n"
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    named = {PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(named, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def merge(
    state: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """A network's state dict with the products of the adapters added, in float32.

    Raises:
        CheckpointError: an adapter without its counterpart, of another shape, or of no matrix.
    """
    merged = dict(state)
    matched = [m for m in map(ADAPTER_NAMES.fullmatch, adapters) if m is not None]
    matrices = {match["matrix"] for match in matched}
    for matrix in matrices:
        name = f"{matrix}.weight"
        down, up = (adapters.get(f"{matrix}.lora_{side}.weight") for side in "AB")
        if down is None or up is None or name not in state:
            raise CheckpointError(f"the adapters of {name!r} lack their counterpart")
        if (up.shape[0], down.shape[1]) != tuple(state[name].shape) or up.shape[1] != len(down):
            raise CheckpointError(f"the adapters of {name!r} have another shape than the matrix")
        change = scale * (up.float() @ down.float())
        merged[name] = (state[name].float() + change.to(state[name].device)).to(state[name].dtype)
    for name in adapters.keys() - {match.string for match in matched}:
        if name not in state or adapters[name].shape != state[name].shape:
            raise CheckpointError(f"the adapters' {name!r} does not fit the network")
        merged[name] = adapters[name].to(state[name].device, state[name].dtype)
    return merged
