"""Losses on held-out episodes, and their dependence on instruction and images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from pi05_lab.training.config import TrainConfig
from pi05_lab.training.data import Batch, Examples
from pi05_lab.training.losses import TrainModule
from pi05_lab.training.processes import Processes
from pi05_ros.policy.images import EMPTY

BATCH = 32
SAMPLED = 2
"""Batches whose chunks are sampled, which takes ten times as long as a loss."""


@torch.no_grad()
def validate(
    module: TrainModule,
    examples: Examples,
    losses: Mapping[str, float],
    config: TrainConfig,
    processes: Processes,
) -> dict[str, float]:
    """Losses on held-out frames; the same frames, noise and times for the same seed.

    The processes share the batches; each has the result. The flow loss adds three figures:
    `flow_other_text` and `flow_black`, the loss with another frame's instruction and with black
    images, which are higher if the network uses instruction and images; `action_error`, the mean
    error of sampled chunks in normalised units.

    Returns:
        Name → figure; empty without held-out frames.
    """
    wanted = {name: 1.0 for name, weight in losses.items() if weight > 0}
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    frames, seed = min(config.validation.frames, len(examples.held_out)), config.seed
    batches = zip(
        examples.validation(frames, BATCH, seed),
        examples.validation(frames, BATCH, seed, other_text=True),
        strict=True,
    )
    for index, (cpu_batch, other) in enumerate(_shared(batches, frames, processes)):
        batch = cpu_batch.to(processes.device)
        figures = module(batch, wanted)[1]
        if "flow" in wanted:
            flow = {"flow": 1.0}
            black = replace(batch, images=torch.full_like(batch.images, EMPTY))
            figures["flow_other_text"] = module(other.to(processes.device), flow)[1]["flow"]
            figures["flow_black"] = module(black, flow)[1]["flow"]
            if index * processes.count < SAMPLED:
                error = (module.sample(batch) - batch.actions).abs()
                figures["action_error"] = error[..., : module.network.config.action_dim].mean()
        rows = len(batch.tokens)
        for name, value in figures.items():
            sums[name] += float(value) * rows
            counts[name] += rows
    total, rows_of = processes.sum(sums), processes.sum(counts)
    return {name: value / rows_of[name] for name, value in total.items()}


def _shared(
    pairs: Iterable[tuple[Batch, Batch]], frames: int, processes: Processes
) -> Iterator[tuple[Batch, Batch]]:
    """The share of the batches that this process takes.

    All processes take the same number, because a sharded network runs in all of them at once. With
    fewer batches than processes each takes all; otherwise an incomplete last round is left out.
    """
    count = math.ceil(frames / BATCH)
    rounds = max(1, count // processes.count)
    for index, pair in enumerate(pairs):
        if count < processes.count or (
            index < rounds * processes.count and index % processes.count == processes.rank
        ):
            yield pair
