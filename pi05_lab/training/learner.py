"""The network with its helper heads, and the losses of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi05_lab.training.batches import Batch
from pi05_lab.training.config import AuxLossConfig, StageConfig, TrainConfig
from pi05_lab.training.heads import Helpers, Seen, watch
from pi05_ros.policy.model import KeyValue, Pi0, Prefix, Rotary

_PREFIX_LOSSES = ("flow", "chunk", "named_position")


class TrainModule(nn.Module):
    """What the optimiser sees: the network, and the heads of the losses that helped it."""

    def __init__(
        self,
        network: Pi0,
        helpers: AuxLossConfig,
        losses: set[str],
        name_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.helpers = Helpers(network.config, helpers, losses, name_ids)

    def forward(
        self, batch: Batch, losses: Mapping[str, float], insulate: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each one by itself, detached."""
        wanted = {name: weight for name, weight in losses.items() if weight > 0}
        values: dict[str, Tensor] = {}
        seen: Seen | None = None
        if any(name in _PREFIX_LOSSES for name in wanted):
            prefix, seen = self._encode(batch, insulate)
            if "flow" in wanted:
                values["flow"] = flow_loss(self.network, prefix, batch, insulate)
            if "chunk" in wanted:
                values["chunk"] = self.helpers.chunk_loss(batch, seen)
            if "named_position" in wanted:
                values["named_position"] = self.helpers.name_loss(batch, seen)
        if "pixels" in wanted:
            if seen is None:
                seen = Seen(features=self.network.vision(batch.images.flatten(0, 1)))
            values["pixels"] = self.helpers.pixel_loss(self.network, batch, seen)
        if "scene" in wanted:
            values["scene"] = self.helpers.scene_loss(self.network, batch, seen)
        total = torch.stack([values[name] * weight for name, weight in wanted.items()]).sum()
        return total, {name: value.detach() for name, value in values.items()}

    def _encode(self, batch: Batch, insulate: bool) -> tuple[Prefix, Seen]:
        tasks = len(batch.tokens) // len(batch.images)
        with watch(self.network, len(batch.tokens), tasks, insulate) as seen:
            prefix = self.network.encode_prefix(
                batch.images.repeat_interleave(tasks, dim=0),
                batch.image_masks.repeat_interleave(tasks, dim=0),
                batch.tokens,
                batch.token_masks,
            )
        return prefix, seen


def flow_loss(network: Pi0, prefix: Prefix, batch: Batch, insulate: bool = False) -> Tensor:
    """Mean squared error of the velocity over the real dimensions, for every noise and time.

    x_t = t · noise + (1 - t) · actions, and the velocity wanted is noise - actions. The prefix is
    encoded once for all the noise of its row.

    Args:
        network: of any size.
        prefix: of the batch's pictures and instructions.
        batch: K times as many rows of noise and times as of instructions.
        insulate: no gradient reaches the prefix through its keys and values, but the last layer's.
    """
    repeats = len(batch.times) // len(batch.tokens)
    actions = batch.actions.repeat_interleave(repeats, dim=0)
    t = batch.times[:, None, None]
    # As in inference, where these run in float32 whatever the rest does.
    with torch.autocast(batch.times.device.type, enabled=False):
        time_features = network.time_features(batch.times)
    state = None
    if not network.adaptive:
        state = batch.states.repeat_interleave(repeats, dim=0)
    velocity = network.denoise(
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
    """Which of `config.PARTS` a parameter of the learner belongs to.

    None for what no loss reaches: of the prefix's last layer only keys and values are used.
    """
    if name.startswith("helpers."):
        return "helpers"
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
    learner: TrainModule, stage: StageConfig, config: TrainConfig
) -> dict[str, nn.Parameter]:
    """Mark what learns in a stage, by `requires_grad`, and return it by name."""
    parts = {"helpers", *stage.train}
    if config.freeze_vision_encoder:
        parts.discard("vision")
    if config.train_expert_only:
        parts &= {"helpers", "expert"}
    depth = learner.network.config.sizes.vlm.depth
    chosen = {}
    for name, parameter in learner.named_parameters():
        learns = part_of(name, depth) in parts
        parameter.requires_grad_(learns)
        if learns:
            chosen[name] = parameter
    return chosen


def checkpoint_layers(network: Pi0) -> None:
    """Compute the layers' insides again in the backward pass instead of keeping them."""
    for layer in network.vision.layers:
        layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]
    for expert in (network.experts.vlm, network.experts.action):
        for part in expert.stack:
            part.project = _checkpointed(part.project)  # type: ignore[method-assign]
            part.finish = _checkpointed(part.finish)  # type: ignore[method-assign]


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        return cast("Any", checkpoint)(function, *args, use_reentrant=False)

    return run
