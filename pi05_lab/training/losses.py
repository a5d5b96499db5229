"""The losses of one batch: flow matching, with knowledge insulation, and a plug-in's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi05_lab.training.config import StageConfig, TrainConfig
from pi05_lab.training.data import Batch
from pi05_lab.training.plugins import AuxiliaryLosses
from pi05_ros.policy.model import KeyValue, Pi0, Prefix, Rotary


class TrainModule(nn.Module):
    """What is trained: the network, and the heads of the auxiliary losses."""

    def __init__(self, network: Pi0, auxiliary: AuxiliaryLosses | None = None) -> None:
        super().__init__()
        self.network = network
        self.auxiliary = auxiliary

    def forward(
        self, batch: Batch, losses: Mapping[str, float], insulate: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each loss, detached."""
        wanted = {name: weight for name, weight in losses.items() if weight > 0}
        names = wanted.keys() - {"flow"}
        values: dict[str, Tensor] = {}
        features: PrefixFeatures | None = None
        if "flow" in wanted or (self.auxiliary and names & self.auxiliary.prefix_losses):
            prefix, features = self._encode(batch, insulate)
            if "flow" in wanted:
                values["flow"] = flow_loss(self.network, prefix, batch, insulate)
        if self.auxiliary and names:
            values |= self.auxiliary(self.network, batch, names, features)
        total = torch.stack([values[name] * weight for name, weight in wanted.items()]).sum()
        return total, {name: value.detach() for name, value in values.items()}

    def _encode(self, batch: Batch, insulate: bool) -> tuple[Prefix, PrefixFeatures]:
        tasks = len(batch.tokens) // len(batch.images)
        with capture_prefix(self.network, len(batch.tokens), tasks, insulate) as features:
            prefix = self.network.encode_prefix(
                batch.images.repeat_interleave(tasks, dim=0),
                batch.image_masks.repeat_interleave(tasks, dim=0),
                batch.tokens,
                batch.token_masks,
            )
        return prefix, features


@dataclass
class PrefixFeatures:
    """Intermediate results of the prefix."""

    hidden: list[Tensor] = field(default_factory=list)
    """Per layer of the language model: its input [B, T, width]."""
    vision: Tensor | None = None
    """[P · n_cameras, tokens, width] of the vision encoder."""


@contextmanager
def capture_prefix(
    network: Pi0, rows: int, repeats: int = 1, insulate: bool = False
) -> Iterator[PrefixFeatures]:
    """Keep the prefix's intermediate results while the network runs; its result is the same.

    Args:
        network: of any size.
        rows: of the batch.
        repeats: consecutive rows with the same images; the vision encoder sees them once.
        insulate: no gradient passes from the last layer's keys and values to the layers below.
    """
    features = PrefixFeatures()
    last = network.experts.vlm.layers[-1].attention_norm

    def before_vision(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].unflatten(0, (rows // repeats, repeats, -1))[:, 0].flatten(0, 1),)

    def after_vision(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        features.vision = output
        by_image = output.unflatten(0, (rows // repeats, -1))
        return by_image.repeat_interleave(repeats, dim=0).flatten(0, 1)

    def before_layer(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        features.hidden.append(args[0])
        return (args[0].detach(), *args[1:]) if insulate and norm is last else None

    hooks = [
        network.vision.register_forward_pre_hook(before_vision),
        network.vision.register_forward_hook(after_vision),
        *(
            layer.attention_norm.register_forward_pre_hook(before_layer)
            for layer in network.experts.vlm.layers
        ),
    ]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def flow_loss(network: Pi0, prefix: Prefix, batch: Batch, insulate: bool = False) -> Tensor:
    """Mean squared error of the velocity over the robot's dimensions and all noise and times.

    x_t = t · noise + (1 - t) · actions; the target velocity is noise - actions.

    Args:
        network: of any size.
        prefix: of the batch's images and instructions, encoded once.
        batch: with K rows of noise and time per instruction.
        insulate: the gradient reaches only the last of the prefix's layers.
    """
    repeats = len(batch.times) // len(batch.tokens)
    actions = batch.actions.repeat_interleave(repeats, dim=0)
    t = batch.times[:, None, None]
    # float32, as in inference
    with torch.autocast(batch.times.device.type, enabled=False):
        time_features = network.time_features(batch.times)
    state = None
    if not network.adaptive:
        state = batch.states.repeat_interleave(repeats, dim=0)
    velocity = network.denoise_step(
        _repeat(prefix, repeats, insulate),
        t * batch.noise + (1 - t) * actions,
        time_features,
        state,
    )
    real = network.config.action_dim or network.config.max_action_dim
    error = velocity - (batch.noise - actions)
    return error[:, :, :real].square().mean()


def _repeat(prefix: Prefix, repeats: int, insulate: bool) -> Prefix:
    cache = list(prefix.cache)
    if insulate:
        cache[:-1] = [KeyValue(kv.key.detach(), kv.value.detach()) for kv in cache[:-1]]
    if repeats == 1:
        return prefix._replace(cache=cache)
    mask = prefix.suffix_mask
    return Prefix(
        [KeyValue(*(x.repeat_interleave(repeats, dim=0) for x in kv)) for kv in cache],
        Rotary(*(x.repeat_interleave(repeats, dim=0) for x in prefix.suffix_angles)),
        None if mask is None else mask.repeat_interleave(repeats, dim=0),
    )


def part_of(name: str, depth: int) -> str | None:
    """The part of a parameter: of `config.PARTS`, or "auxiliary".

    None where no loss reaches: only keys and values of the prefix's last layer are used.
    """
    if name.startswith("auxiliary."):
        return "auxiliary"
    name = name.removeprefix("network.")
    if name.startswith("vision.projector"):
        return "projector"
    for part in ("vision", "embedder"):
        if name.startswith(f"{part}."):
            return part
    if not name.startswith("experts.vlm."):
        return "expert"
    inner = name.removeprefix("experts.vlm.")
    last = f"layers.{depth - 1}."
    if inner.startswith((f"{last}qkv", f"{last}attention_norm")):
        return "bridge"
    return None if inner.startswith((last, "final_norm")) else "prefix"


def choose_parameters(
    module: TrainModule, stage: StageConfig, config: TrainConfig
) -> dict[str, nn.Parameter]:
    """Set `requires_grad` for a stage; returns the parameters that learn, by name."""
    parts = {"auxiliary", *stage.train}
    if config.freeze_vision_encoder:
        parts.discard("vision")
    if config.train_expert_only:
        parts &= {"auxiliary", "expert"}
    depth = module.network.config.sizes.vlm.depth
    chosen = {}
    for name, parameter in module.named_parameters():
        learns = part_of(name, depth) in parts
        parameter.requires_grad_(learns)
        if learns:
            chosen[name] = parameter
    return chosen


def checkpoint_layers(network: Pi0) -> None:
    """Recompute the layers in the backward pass instead of keeping their activations."""
    for layer in network.vision.layers:
        layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]
    for expert in (network.experts.vlm, network.experts.action):
        for part in expert.layers:
            part.before_attention = _checkpointed(part.before_attention)  # type: ignore[method-assign]
            part.after_attention = _checkpointed(part.after_attention)  # type: ignore[method-assign]


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        return cast("Any", checkpoint)(function, *args, use_reentrant=False)

    return run
