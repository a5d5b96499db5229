"""AdamW, Muon for matrices, the learning rate's course, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from pi05_lab.training.config import StageConfig

# Newton-Schulz coefficients of Jordan et al. 2024 (Muon): the iteration drives all singular values
# to around 1 in five rounds, at the price of not converging to exactly 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_ADAM_RMS = 0.2
"""Root mean square of AdamW's usual update (Liu et al. 2025): one rate suits both optimisers."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix moves at the same speed.

    Matrices of one shape are handled together, which is what makes it quick for many small ones.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)
        return None

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(torch.lerp(gradient, state["momentum"], group["momentum"]))
        updates = orthogonalize(torch.stack(directions))
        scale = _ADAM_RMS * math.sqrt(max(parameters[0].shape)) * group["lr"]
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] → the nearest matrices with all singular values around 1, float32."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: the matrices that map one hidden state to another.

    Embeddings, first and last layers, norms' modulations and helper heads are AdamW's.
    """
    inner = ".layers." in name or name.endswith("projector.weight")
    return parameter.ndim == 2 and inner


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], stage: StageConfig
) -> list[torch.optim.Optimizer]:
    """The stage's optimisers for the parameters that learn in it."""
    matrices = {
        name
        for name, parameter in parameters.items()
        if stage.optimizer == "muon" and is_matrix(name, parameter)
    }
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                [p for name, p in parameters.items() if name in matrices],
                stage.lr,
                weight_decay=stage.weight_decay,
            )
        )
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    # Biases, norms and embeddings are not decayed towards 0.
    decayed = [p for name, p in rest.items() if p.ndim > 1 and "embedder" not in name]
    kept = [p for name, p in rest.items() if p.ndim <= 1 or "embedder" in name]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, stage.weight_decay), (kept, 0.0))
        if group
    ]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=1e-8))
    return optimizers


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up, the full rate for a while, then a cosine down to `final_lr` of it.

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

    In a stage's first steps it follows faster, so that it does not remember how the stage began.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take the parameters after the step `step`, 0 for the stage's first."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step)) if self.decay else 1.0
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.shadow[name].lerp_(parameter, weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])
