"""Optimisers and parameter groups, learning rate schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from pi05_lab.training.config import StageConfig


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: matrices that map one hidden state to another.

    AdamW takes embeddings, first and last layers, modulations of norms and auxiliary heads.
    """
    inner = ".layers." in name or name.endswith("projector.weight")
    return parameter.ndim == 2 and inner


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], stage: StageConfig
) -> list[torch.optim.Optimizer]:
    """The optimisers of a stage for the parameters that learn in it."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if stage.optimizer == "muon" and is_matrix(name, parameter):
            matrices.append(parameter)
        elif parameter.ndim > 1 and "embedder" not in name:
            decayed.append(parameter)
        else:  # biases, norms and embeddings have no weight decay
            kept.append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    decay = stage.weight_decay
    if matrices:
        # With AdamW's update size (Liu et al. 2025) one learning rate suits both optimisers.
        muon = torch.optim.Muon(
            matrices, lr=stage.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    groups = [
        {"params": group, "weight_decay": group_decay}
        for group, group_decay in ((decayed, decay), (kept, 0.0))
        if group
    ]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=1e-8))
    return optimizers


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up, constant for `hold` of the stage, then a cosine down to `final_lr` of it.

    `step` is 0 for the stage's first; `progress` is its completed part, 0 to 1.
    """
    warmup = min(1.0, (step + 1) / (stage.warmup_steps + 1))
    falling = (progress - stage.hold) / (1 - stage.hold) if progress > stage.hold else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
    return stage.lr * warmup * (stage.final_lr + (1 - stage.final_lr) * cosine)


class AveragedWeights:
    """Exponential moving average of a module's parameters.

    The decay is lower in the first steps of a stage, so that its initial weights lose influence.
    """

    def __init__(self, module: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, decay: float) -> None:
        """Average in the parameters after step `step` of the stage, 0 for its first."""
        weight = 1 - min(decay, (1 + step) / (10 + step)) if decay else 1.0
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.shadow[name].lerp_(parameter, weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Set the module's parameters to the averages."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module has the averages."""
        own = AveragedWeights(module)
        self.copy_to(module)
        try:
            yield
        finally:
            own.copy_to(module)
