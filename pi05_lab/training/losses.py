"""The losses of one batch: flow matching, with knowledge insulation, and a plug-in's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi05_lab.training.config import StageConfig, TrainConfig
from pi05_lab.training.data import Batch
from pi05_lab.training.lora import learns_with_adapters
from pi05_lab.training.plugins import AuxiliaryLosses
from pi05_ros.policy.model import KeyValue, Pi0, Prefix, Rotary


class TrainModule(nn.Module):
    """What is trained: the network, and the heads of the auxiliary losses."""

    def __init__(self, network: Pi0, auxiliary: AuxiliaryLosses | None = None) -> None:
        super().__init__()
        self.network = network
        self.auxiliary = auxiliary
        self.padded = is_padding_connected(network)
        """Whether the padded dimensions of the actions reach the network."""

    def forward(
        self, batch: Batch, losses: Mapping[str, float], insulate: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each loss, detached."""
        wanted = {name: weight for name, weight in losses.items() if weight > 0}
        names = wanted.keys() - {"flow"}
        values: dict[str, Tensor] = {}
        features: PrefixFeatures | None = None
        total = torch.zeros((), device=batch.times.device)
        if "flow" in wanted or (self.auxiliary and names & self.auxiliary.prefix_losses):
            tasks = len(batch.tokens) // len(batch.images)
            with capture_prefix(self.network, len(batch.tokens), tasks, insulate) as features:
                prefix = self.network.encode_prefix(
                    batch.images.repeat_interleave(tasks, dim=0),
                    batch.image_masks.repeat_interleave(tasks, dim=0),
                    batch.tokens,
                    batch.token_masks,
                )
            if "flow" in wanted:
                errors = flow_errors(self.network, prefix, batch, insulate, self.padded)
                size = self.network.config.action_dim or errors.shape[-1]
                values["flow"] = errors[..., :size].mean()
                # all dimensions have the same weight, as in openpi; the robot's are reported
                total = total + wanted["flow"] * errors.sum() / errors[..., :size].numel()
        if self.auxiliary and names:
            values |= self.auxiliary(self.network, batch, names, features)
        for name in names:
            total = total + values[name] * wanted[name]
        return total, {name: value.detach() for name, value in values.items()}

    def sample(self, batch: Batch) -> Tensor:
        """[P, H, max_action_dim] chunks of a batch with one instruction per image, normalised."""
        network = self.network
        return network.sample_actions(
            batch.images,
            batch.image_masks,
            batch.tokens,
            batch.token_masks,
            state=None if network.adaptive else batch.states,
            noise=batch.noise,
            num_steps=network.config.num_steps,
        )


def is_padding_connected(network: Pi0) -> bool:
    """Whether the actions' dimensions beyond the robot's have weights other than zero.

    A pre-trained network has them: other robots use these dimensions.
    """
    size = network.config.action_dim
    return size is not None and bool(network.action_in_proj.weight[:, size:].any())


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

    Each `repeats` consecutive rows have the same images, which the vision encoder encodes once.
    With `insulate` no gradient passes from the last layer's keys and values to the layers below.
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
    ]
    for layer in network.experts.vlm.layers:
        hooks.append(layer.attention_norm.register_forward_pre_hook(before_layer))
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def flow_errors(
    network: Pi0, prefix: Prefix, batch: Batch, insulate: bool = False, padded: bool = True
) -> Tensor:
    """[rows, max_action_dim] mean squared error of the velocity over each chunk's steps.

    x_t = t · noise + (1 - t) · actions; the target velocity is noise - actions. The first `delays`
    steps of a chunk have t = 0 and no loss.

    Args:
        network: π0.5 or π0.
        prefix: encoded once for the K rows of noise and time of each instruction.
        batch: of one step.
        insulate: the gradient reaches only the last of the prefix's layers.
        padded: the padded dimensions are trained, so that sampling, which has noise in them, finds
            x_t as here; otherwise they are zero and without loss.
    """
    repeats = len(batch.times) // len(batch.tokens)
    actions = batch.actions.repeat_interleave(repeats, dim=0)
    steps = torch.arange(actions.shape[1], device=actions.device)
    clean = steps < batch.delays[:, None]
    t = torch.where(clean, 0.0, batch.times[:, None])[..., None]
    # float32, as in inference
    with torch.autocast(batch.times.device.type, enabled=False):
        time_features = network.time_features(batch.times)
        if batch.has_delays:
            at_zero = network.time_features(torch.zeros_like(batch.times[:1]))
            clean_features = clean[:, None, None, :, None]
            time_features = torch.where(
                clean_features, at_zero[:, :, :, None], time_features[:, :, :, None]
            )
    state = None if network.adaptive else batch.states.repeat_interleave(repeats, dim=0)
    prefix = _repeat(prefix, repeats, insulate)
    x_t = t * batch.noise + (1 - t) * actions
    used = torch.ones_like(x_t[0, 0])
    if not padded:
        used[network.config.action_dim :] = 0.0
    velocity = network.denoise_step(prefix, x_t * used, time_features, state)
    errors = (velocity - (batch.noise - actions)).square() * used
    left = (~clean)[..., None]
    return (errors * left).sum(1) / left.sum(1)


def _repeat(prefix: Prefix, repeats: int, insulate: bool) -> Prefix:
    def repeat(x: Tensor) -> Tensor:
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=0)

    cache, mask = list(prefix.cache), prefix.suffix_mask
    if insulate:
        cache[:-1] = [KeyValue(kv.key.detach(), kv.value.detach()) for kv in cache[:-1]]
    return Prefix(
        [KeyValue(*map(repeat, kv)) for kv in cache],
        Rotary(*map(repeat, prefix.suffix_angles)),
        None if mask is None else repeat(mask),
    )


def part_of(name: str, depth: int) -> str | None:
    """The part of a parameter: of `config.PARTS`, or "auxiliary".

    None where no loss reaches: only keys and values of the prefix's last layer are used.
    """
    last = f"network.experts.vlm.layers.{depth - 1}."
    parts = {
        "auxiliary.": "auxiliary",
        "network.vision.projector": "projector",
        "network.vision.": "vision",
        "network.embedder.": "embedder",
        f"{last}qkv": "bridge",
        f"{last}attention_norm": "bridge",
        last: None,
        "network.experts.vlm.final_norm": None,
        "network.experts.vlm.": "prefix",
        "network.": "expert",
    }
    return next(part for beginning, part in parts.items() if name.startswith(beginning))


def choose_parameters(
    module: TrainModule, stage: StageConfig, config: TrainConfig
) -> dict[str, nn.Parameter]:
    """Set `requires_grad` for a stage; returns the parameters that learn, by name."""
    parts = {"auxiliary", *stage.train}
    if config.freeze_vision_encoder:
        parts -= {"vision"}
    if config.train_expert_only:
        parts &= {"auxiliary", "expert"}
    depth = module.network.config.sizes.vlm.depth
    for name, parameter in module.named_parameters():
        learns = part_of(name, depth) in parts
        if config.lora is not None and not name.startswith("auxiliary."):
            learns = learns and learns_with_adapters(name, config.lora)
        parameter.requires_grad_(learns)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def checkpoint_layers(network: Pi0) -> None:
    """Recompute the layers in the backward pass instead of keeping their activations."""
    experts = network.experts
    halves = ("before_attention", "after_attention")
    methods = [(layer, "forward") for layer in network.vision.layers]
    methods += [(e, half) for e in (*experts.vlm.layers, *experts.action.layers) for half in halves]
    for layer, name in methods:
        setattr(layer, name, partial(checkpoint, getattr(layer, name), use_reentrant=False))
