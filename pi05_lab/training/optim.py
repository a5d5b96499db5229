"""Optimisers and parameter groups, learning rate schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    muon = stage.optimizer == "muon"
    matrices = [p for name, p in parameters.items() if muon and is_matrix(name, p)]
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if muon and is_matrix(name, parameter):
            continue
        # Biases, norms and embeddings have no weight decay.
        decays = parameter.ndim > 1 and "embedder" not in name
        (decayed if decays else kept).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        # With AdamW's update size (Liu et al. 2025) one learning rate suits both optimisers.
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=stage.lr,
                weight_decay=stage.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, stage.weight_decay), (kept, 0.0))
        if group
    ]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=1e-8))
    return optimizers


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up, constant for `hold` of the stage, then a cosine down to `final_lr` of it.

    Args:
        stage: its rates.
        step: 0 for the first.
        progress: of the stage, 0 to 1.
    """
    warmup = min(1.0, (step + 1) / (stage.warmup_steps + 1))
    falling = (progress - stage.hold) / (1 - stage.hold) if progress > stage.hold else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
    return stage.lr * warmup * (stage.final_lr + (1 - stage.final_lr) * cosine)


class AveragedWeights:
    """Exponential moving average of a module's parameters.

    The decay is lower in the first steps of a stage, so that its initial weights lose influence.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Average in the parameters after step `step` of the stage, 0 for its first."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step)) if self.decay else 1.0
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.shadow[name].lerp_(parameter, weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Set the module's parameters to the averages."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])
