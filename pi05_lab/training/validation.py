"""Losses on held-out episodes, and their dependence on instruction and images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from pi05_lab.training.data import Batch, Examples
from pi05_lab.training.losses import TrainModule
from pi05_lab.training.optim import AveragedWeights
from pi05_ros.policy.images import EMPTY

BATCH = 32
SAMPLED = 2
"""Batches whose chunks are sampled, which takes ten times as long as a loss."""


@contextmanager
def averaged(module: TrainModule, weights: AveragedWeights) -> Iterator[None]:
    """Inside, the module has its averaged weights."""
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    weights.copy_to(module)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(own[name])


@torch.no_grad()
def validate(
    module: TrainModule,
    examples: Examples,
    losses: Mapping[str, float],
    frames: int,
    seed: int,
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

    def add(name: str, value: torch.Tensor, rows: int) -> None:
        sums[name] += float(value) * rows
        counts[name] += rows

    pairs = zip(
        examples.validation(frames, BATCH, seed),
        examples.validation(frames, BATCH, seed, other_text=True),
        strict=True,
    )
    for index, (cpu_batch, other) in enumerate(pairs):
        batch = cpu_batch.to(device)
        rows = len(batch.tokens)
        for name, value in module(batch, wanted)[1].items():
            add(name, value, rows)
        if "flow" not in wanted:
            continue
        flow = {"flow": 1.0}
        add("flow_other_text", module(other.to(device), flow)[0], rows)
        black = replace(batch, images=torch.full_like(batch.images, EMPTY))
        add("flow_black", module(black, flow)[0], rows)
        if index < SAMPLED:
            add("action_error", _action_error(module, batch), rows)
    return {name: total / counts[name] for name, total in sums.items()}


def _action_error(module: TrainModule, batch: Batch) -> torch.Tensor:
    network = module.network
    sampled = network.sample_actions(
        batch.images,
        batch.image_masks,
        batch.tokens,
        batch.token_masks,
        state=None if network.adaptive else batch.states,
        noise=batch.noise,
        num_steps=network.config.num_steps,
    )
    real = network.config.action_dim
    return (sampled - batch.actions)[:, :, :real].abs().mean()
