"""Losses on held-out episodes, and their dependence on instruction and images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch

from pi05_lab.training.config import TrainConfig
from pi05_lab.training.data import Batch, Examples
from pi05_lab.training.losses import TrainModule
from pi05_ros.policy.images import EMPTY
from pi05_ros.policy.model import Pi0

BATCH = 32
SAMPLED = 2
"""Batches whose chunks are sampled, which takes ten times as long as a loss."""


@torch.no_grad()
def validate(
    module: TrainModule,
    examples: Examples,
    losses: Mapping[str, float],
    config: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """Losses on held-out frames; the same frames, noise and times for the same seed.

    The flow loss adds three figures: `flow_other_text` and `flow_black`, the loss with another
    frame's instruction and with black images, which are higher if the network uses instruction and
    images; `action_error`, the mean error of sampled chunks in normalised units.

    Returns:
        Name → figure; empty without held-out frames.
    """
    wanted = {name: 1.0 for name, weight in losses.items() if weight > 0}
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    frames, seed = config.validation.frames, config.seed
    pairs = zip(
        examples.validation(frames, BATCH, seed),
        examples.validation(frames, BATCH, seed, other_text=True),
        strict=True,
    )
    for index, (cpu_batch, other) in enumerate(pairs):
        batch = cpu_batch.to(device)
        figures = module(batch, wanted)[1]
        if "flow" in wanted:
            flow = {"flow": 1.0}
            black = replace(batch, images=torch.full_like(batch.images, EMPTY))
            figures["flow_other_text"] = module(other.to(device), flow)[0]
            figures["flow_black"] = module(black, flow)[0]
            if index < SAMPLED:
                figures["action_error"] = _action_error(module.network, batch)
        rows = len(batch.tokens)
        for name, value in figures.items():
            sums[name] += float(value) * rows
            counts[name] += rows
    return {name: total / counts[name] for name, total in sums.items()}


def _action_error(network: Pi0, batch: Batch) -> torch.Tensor:
    sampled = network.sample_actions(
        batch.images,
        batch.image_masks,
        batch.tokens,
        batch.token_masks,
        state=None if network.adaptive else batch.states,
        noise=batch.noise,
        num_steps=network.config.num_steps,
    )
    error = (sampled - batch.actions)[:, :, : network.config.action_dim]
    return error.abs().mean()
