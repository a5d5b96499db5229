"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, in the layers of the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pi05_lab.training.config import ConfigError, LoraConfig
from pi05_ros.policy.adapters import ADAPTER_NAMES, merge
from pi05_ros.policy.model import Pi0

_ADAPTED = re.compile(r"lora_[AB]\.default\.")
_WHOLE = (
    "action_in_proj", "action_out_proj", "time_mlp", "state_proj", "action_time_mlp",
)  # fmt: skip
"""Projections around the expert, which learn whole: a robot's dimensions are new to them."""


def add_adapters(network: Pi0, lora: LoraConfig) -> None:
    """Put adapters beside the matrices of the parts' transformer layers.

    The prefix's last layer has none: the network uses a part of one of its matrices alone.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ConfigError("lora needs the package peft: pip install 'pi05_ros[train]'") from None
    targets = []
    for name, module in network.named_modules():
        part = _part_of_layer(name, network.config.sizes.vlm.depth)
        if isinstance(module, nn.Linear) and part in lora.parts:
            targets.append(name)
    # peft's annotation says int, its arithmetic takes any number
    alpha: Any = lora.alpha
    settings = PeftConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets)
    inject_adapter_in_model(settings, network)


def _part_of_layer(name: str, prefix_depth: int) -> str | None:
    if name.startswith("experts.action.layers."):
        return "expert"
    if name.startswith("experts.vlm.layers."):
        return "prefix" if int(name.split(".")[3]) < prefix_depth - 1 else None
    return None


def learns_with_adapters(name: str, lora: LoraConfig) -> bool:
    """Whether a parameter of the network learns beside adapters, by its name in the module."""
    if _ADAPTED.search(name):
        return True
    return "expert" in lora.parts and any(f".{part}" in name for part in _WHOLE)


def split_state(
    state: Mapping[str, Tensor], lora: LoraConfig | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's state dict → the whole network's, merged, and the part that learnt.

    The second has peft's names of adapters, and plain names of what learns whole; it is empty
    without adapters.
    """
    if lora is None:
        return dict(state), {}
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not _ADAPTED.search(name)
    }
    adapters = {
        name.replace(".default.", "."): tensor
        for name, tensor in state.items()
        if _ADAPTED.search(name)
    }
    learnt = {name: tensor for name, tensor in base.items() if name.startswith(_WHOLE)}
    learnt = learnt if "expert" in lora.parts else {}
    assert all(ADAPTER_NAMES.fullmatch(name) for name in adapters)
    return merge(base, adapters, lora.alpha / lora.rank), adapters | learnt
