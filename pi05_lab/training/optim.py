"""Optimisers and parameter groups, learning rate schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pi05_lab.training.config import StageConfig

PIECE = 1 << 24
"""Elements of a parameter that `CompactAdamW` updates at a time."""


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: matrices that map one hidden state to another.

    AdamW takes embeddings, first and last layers, modulations of norms and auxiliary heads.
    """
    inner = ".layers." in name or name.endswith("projector.weight")
    return parameter.ndim == 2 and inner


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with its two moments in bfloat16, which halves their memory.

    The arithmetic is float32. A moment moves by 1 - beta of its distance per step, which must be
    well above bfloat16's rounding: beta is at most 0.98.
    """

    def __init__(
        self, groups: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "step": 0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        count, (beta1, beta2) = group["step"], group["betas"]
        rate = group["lr"] / (1 - beta1**count)
        scale = math.sqrt(1 - beta2**count)
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        # in pieces: the float32 copies of a large embedding would take gigabytes
        pieces = (_local(tensor).view(-1).split(PIECE) for tensor in tensors)
        for weight, gradient, first, second in zip(*pieces, strict=True):
            mean = first.float().lerp_(gradient, 1 - beta1)
            square = second.float().lerp_(gradient.square(), 1 - beta2)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(mean, square.sqrt().div_(scale).add_(group["eps"]), value=-rate)
            first.copy_(mean)
            second.copy_(square)


def _local(tensor: Any) -> Tensor:
    """The shard of a tensor that this process has."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], stage: StageConfig, precision: str = "float32"
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
    if groups and precision == "bfloat16":
        optimizers.append(CompactAdamW(groups, stage.lr, stage.betas))
    elif groups:
        # The fused kernel has no temporaries; the default has one of the size of all parameters.
        fused = all(parameter.is_cuda for parameter in parameters.values())
        optimizers.append(
            torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=1e-8, fused=fused)
        )
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
    """Exponential moving average of a stage's parameters.

    The decay is lower in the first steps, so that the initial weights lose influence.

    Args:
        parameters: that learn, by name.
        decay: 0 keeps no averages: the parameters stand for them.
        device: of the averages; "" is the parameters' own.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, device: str = ""
    ) -> None:
        self._parameters = dict(parameters) if decay else {}
        self._decay = decay
        self.shadow = {
            name: p.detach().to(device or p.device, copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the parameters after step `step` of the stage, 0 for its first."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            shadow = self.shadow[name]
            shadow.lerp_(parameter.to(shadow.device), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters have the averages; exchanged one by one, without a copy of all."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange parameters and averages."""
        for name, parameter in self._parameters.items():
            own = parameter.clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(own)
