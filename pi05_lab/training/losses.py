"""The losses of one batch: flow matching, with knowledge insulation, and a plug-in's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi05_lab.training.config import LOSSES, StageConfig, TrainConfig
from pi05_lab.training.data import Batch
from pi05_lab.training.lora import learns_with_adapters
from pi05_lab.training.plugins import AuxiliaryLosses
from pi05_ros.policy.model import KeyValue, Pi0, Prefix, Rotary, rotary
from pi05_ros.policy.next_token import embed, language_model

PIECE = 512
"""Tokens whose logits are computed at a time."""


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
        names = wanted.keys() - set(LOSSES)
        values: dict[str, Tensor] = {}
        features: PrefixFeatures | None = None
        total = torch.zeros((), device=batch.times.device)
        if wanted.keys() & set(LOSSES) or (self.auxiliary and names & self.auxiliary.prefix_losses):
            tasks = len(batch.tokens) // len(batch.images)
            inputs = (
                batch.images.repeat_interleave(tasks, dim=0),
                batch.image_masks.repeat_interleave(tasks, dim=0),
                batch.tokens,
                batch.token_masks,
            )
            # With the loss `fast` the last layer is trained as a whole.
            fast = "fast" in wanted
            with capture_prefix(
                self.network, len(batch.tokens), tasks, insulate and not fast
            ) as features:
                if fast:
                    prefix, hidden = encode_with_answers(self.network, *inputs, batch)
                else:
                    prefix = self.network.encode_prefix(*inputs)
            if fast:
                values["fast"] = answer_loss(self.network, hidden, batch)
                total = total + wanted["fast"] * values["fast"]
            if "flow" in wanted:
                if insulate:
                    prefix = detach_prefix(prefix, keep_last=not fast)
                errors = flow_errors(self.network, prefix, batch, self.padded)
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


def encode_with_answers(
    network: Pi0,
    images: Tensor,
    image_masks: Tensor,
    tokens: Tensor,
    token_masks: Tensor,
    batch: Batch,
) -> tuple[Prefix, Tensor]:
    """The prefix, and the answers' tokens behind it, in one pass of the language model.

    Images and prompt are one block, which sees no answer; an answer sees the prefix and its own
    earlier tokens. The expert sees the prefix alone, at the positions that it has in inference.

    Returns:
        The prefix, as `Pi0.encode_prefix` gives it, and [B, F, width]: the hidden states that
        predict the F tokens of the answers.
    """
    features = network.embed_images(images)
    x, valid = network.embed_prefix(features, image_masks, tokens, token_masks)
    assert batch.answers is not None
    length, count = batch.answers.shape[1], valid.shape[1]
    total = valid.sum(1, keepdim=True)
    steps = torch.arange(length, device=valid.device)
    positions = torch.cat(((valid.long().cumsum(1) - 1).clamp(min=0), total + steps), dim=1)
    head_dim = network.config.sizes.vlm.head_dim
    own = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    own = torch.cat((own.new_zeros(count, length), own))
    seen = valid[:, None, None, :].expand(-1, -1, count + length, -1)
    mask = torch.cat((seen, own.expand(len(valid), 1, -1, -1)), dim=-1)
    x = torch.cat((x, embed(network, batch.answers)), dim=1)
    hidden, cache = language_model(network, x, rotary(positions, head_dim), mask)
    suffix = network.config.horizon + (not network.adaptive)
    suffix_positions = total + torch.arange(suffix, device=valid.device)
    prefix = Prefix(
        [KeyValue(kv.key[:, :, :count], kv.value[:, :, :count]) for kv in cache],
        rotary(suffix_positions, head_dim),
        network.suffix_mask(valid, suffix, masked=True),
    )
    order = torch.arange(count, device=valid.device)
    last = torch.where(valid, order, 0).argmax(1)
    first = hidden[torch.arange(len(hidden), device=valid.device), last]
    return prefix, torch.cat((first[:, None], hidden[:, count : count + length - 1]), dim=1)


def answer_loss(network: Pi0, hidden: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens: of each answer, then of all answers.

    In pieces that are computed again in the backward pass: the logits of 257,152 entries would take
    a gigabyte per thousand tokens.
    """
    assert batch.answers is not None and batch.answer_masks is not None
    masks = batch.answer_masks
    rows, targets = hidden[masks], batch.answers[masks]
    weights = (masks / masks.sum(1, keepdim=True) / len(masks))[masks]
    total = torch.zeros((), device=hidden.device)
    for piece in zip(rows.split(PIECE), targets.split(PIECE), weights.split(PIECE), strict=True):
        loss = checkpoint(_cross_entropy, network.embedder.weight, *piece, use_reentrant=False)
        total = total + loss
    return total


def _cross_entropy(embedding: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(rows.to(embedding.dtype), embedding).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def detach_prefix(prefix: Prefix, keep_last: bool) -> Prefix:
    """Knowledge insulation (arXiv 2505.23705): the expert sees keys and values as constants.

    `keep_last` leaves those of the last layer, which no other loss trains then.
    """
    count = len(prefix.cache) - keep_last
    cache = [KeyValue(kv.key.detach(), kv.value.detach()) for kv in prefix.cache[:count]]
    return prefix._replace(cache=cache + prefix.cache[count:])


def flow_errors(network: Pi0, prefix: Prefix, batch: Batch, padded: bool = True) -> Tensor:
    """[rows, max_action_dim] mean squared error of the velocity over each chunk's steps.

    x_t = t · noise + (1 - t) · actions; the target velocity is noise - actions. The first `delays`
    steps of a chunk have t = 0 and no loss.

    Args:
        network: π0.5 or π0.
        prefix: encoded once for the K rows of noise and time of each instruction.
        batch: of one step.
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
    prefix = _repeat(prefix, repeats)
    x_t = t * batch.noise + (1 - t) * actions
    used = torch.ones_like(x_t[0, 0])
    if not padded:
        used[network.config.action_dim :] = 0.0
    velocity = network.denoise_step(prefix, x_t * used, time_features, state)
    errors = (velocity - (batch.noise - actions)).square() * used
    left = (~clean)[..., None]
    return (errors * left).sum(1) / left.sum(1)


def _repeat(prefix: Prefix, repeats: int) -> Prefix:
    def repeat(x: Tensor) -> Tensor:
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=0)

    cache, mask = prefix.cache, prefix.suffix_mask
    return Prefix(
        [KeyValue(*map(repeat, kv)) for kv in cache],
        Rotary(*map(repeat, prefix.suffix_angles)),
        None if mask is None else repeat(mask),
    )


def part_of(name: str, depth: int, fast: bool = False) -> str | None:
    """The part of a parameter: of `config.PARTS`, or "auxiliary".

    None where no loss reaches: only keys and values of the prefix's last layer are used, but by the
    loss `fast` (`fast`), which trains all of it.
    """
    rest = "prefix" if fast else None
    last = f"network.experts.vlm.layers.{depth - 1}."
    parts = {
        "auxiliary.": "auxiliary",
        "network.vision.projector": "projector",
        "network.vision.": "vision",
        "network.embedder.": "embedder",
        f"{last}qkv": "bridge",
        f"{last}attention_norm": "bridge",
        last: rest,
        "network.experts.vlm.final_norm": rest,
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
    depth, fast = module.network.config.sizes.vlm.depth, stage.losses.get("fast", 0.0) > 0
    for name, parameter in module.named_parameters():
        learns = part_of(name, depth, fast) in parts
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
