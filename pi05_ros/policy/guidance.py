"""Guidance of the sampler towards the actions that the robot will execute anyway.

Real-time chunking (arXiv 2506.07339, algorithm 1 and equations 2 to 5) in two variants, and its
trained counterpart (arXiv 2512.05964), where the network itself knows clean prefixes.

As in `model`, time runs from t = 1, noise, to t = 0, the action; the paper's τ is 1 - t.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.types import ActionPrefix, FloatArray

logger = logging.getLogger(__name__)

GUIDANCE_METHODS = ("identity", "vjp", "trained")
GUIDANCE_SCHEDULES = ("zeros", "ones", "linear", "exp")
MAX_DELAY_KEY = "rtc_training_max_delay"
"""LeRobot's key in config.json: the longest clean prefix, in steps, that training has shown."""


@dataclass(frozen=True)
class Guidance:
    """How a chunk is made to continue the one before."""

    method: str = "identity"
    """identity: the error itself as correction, as LeRobot computes it; vjp: the paper's, the
    error pulled back through the network, for a backward pass per step; trained: clean prefix."""
    schedule: str = "exp"
    """How the pull decays between the frozen steps and the execution horizon."""
    execution_horizon: int = 0
    """Steps of the old chunk that have a say; the pull is 0 from there on. 0: all that it has left,
    which is the paper's H - s; LeRobot's default is 10, too short for a delay near it."""
    max_weight: float = 10.0
    """Cap of the guidance's weight, which grows beyond all bounds at t = 0 and t = 1."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("method", self.method, GUIDANCE_METHODS),
            ("schedule", self.schedule, GUIDANCE_SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"guidance {what} {value!r}: choose one of {', '.join(known)}")
        if self.execution_horizon < 0:
            raise ValueError(f"execution_horizon must be >= 0, got {self.execution_horizon}")
        if not (math.isfinite(self.max_weight) and self.max_weight >= 0):
            raise ValueError(f"max_weight must be finite and >= 0, got {self.max_weight}")

    def weights(self, frozen: int, given: int, horizon: int) -> FloatArray:
        """[horizon] the pull to each step of an old chunk that has `given` of them left."""
        end = min(self.execution_horizon or given, given)
        return prefix_weights(self.schedule, frozen, end, horizon)

    def check(self, config: PolicyConfig) -> None:
        """Raise ValueError where the method asks for more than the checkpoint has learnt."""
        if self.method != "trained":
            return
        if config.kind != "pi05":
            raise ValueError('guidance "trained" needs a time per token, which π0 does not have')
        if trained_delay(config) < 1:
            raise ValueError(
                f'guidance "trained" needs a checkpoint with {MAX_DELAY_KEY} in its config.json; '
                'use "identity" or "vjp"'
            )


def trained_delay(config: PolicyConfig) -> int:
    """The longest clean prefix that training has shown, in steps; 0: none."""
    return int(config.raw.get(MAX_DELAY_KEY) or 0)


def prefix_weights(schedule: str, frozen: int, execution_horizon: int, horizon: int) -> FloatArray:
    """[horizon] how strongly each step is pulled to the old chunk.

    1 for the frozen steps, 0 from `execution_horizon` on, and between them 0 (zeros), 1 (ones), a
    line (linear) or c·(exp(c) - 1)/(e - 1) of that line's values c (exp, equation 5).
    """
    end = min(execution_horizon, horizon)
    start = min(frozen, end)
    middle = np.linspace(1.0, 0.0, end - start + 2)[1:-1]
    if schedule == "exp":
        middle = middle * np.expm1(middle) / (math.e - 1.0)
    elif schedule != "linear":
        middle = np.full(end - start, 1.0 if schedule == "ones" else 0.0)
    return np.concatenate((np.ones(start), middle, np.zeros(horizon - end)))


def guidance_gain(time: float, max_weight: float) -> float:
    """The correction's factor at t, (t² + τ²)/(t·τ) below the cap (equations 2 and 4)."""
    product = time * (1.0 - time)
    if product <= 0:
        return max_weight
    return min((time**2 + (1.0 - time) ** 2) / product, max_weight)


Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, H, D], time features) → v [B, H, D]."""


class Guide:
    """Guides one sampling; made for one observation."""

    def __init__(
        self,
        guidance: Guidance,
        target: Tensor,
        frozen: int,
        horizon: int,
        dims: int | None = None,
    ) -> None:
        """Lay the target out.

        Args:
            guidance: the settings.
            target: [B, n, D] normalised actions from the observation's moment on, n ≤ horizon.
            frozen: the first steps of it that are executed in any case.
            horizon: of the chunk. Steps that the target lacks are left free.
            dims: how many of the D dimensions pull; the network's padding is left free.
        """
        given = target.shape[1]
        self.method = guidance.method
        self.frozen = frozen
        self.target = torch.nn.functional.pad(target, (0, 0, 0, horizon - given))
        weights = guidance.weights(frozen, given, horizon)
        self.weights = torch.zeros_like(self.target[:1])
        self.weights[:, :, :dims] = torch.tensor(weights, dtype=target.dtype)[:, None].to(target)
        self.max_weight = guidance.max_weight

    def to(self, device: torch.device) -> Guide:
        """The same guide for a network on `device`."""
        moved = copy.copy(self)
        moved.target, moved.weights = self.target.to(device), self.weights.to(device)
        return moved

    @property
    def differentiates(self) -> bool:
        """Whether a step runs the network backwards."""
        return self.method == "vjp"

    def step(
        self, velocity: Velocity, x_t: Tensor, time: float, dt: float, now: Tensor, clean: Tensor
    ) -> Tensor:
        """One Euler step from `time` to time + dt.

        Args:
            velocity: of the network.
            x_t: [B, H, D].
            time, dt: as in `model`; dt is below 0.
            now: time features [1, …] at `time`.
            clean: time features [1, …] at t = 0.
        """
        if self.method == "trained":
            x_t = self._clean_prefix(x_t)
            features = self._per_token(now, clean, x_t.shape[1])
            return self._clean_prefix(x_t + dt * velocity(x_t, features))
        if self.method == "identity":
            v = velocity(x_t, now)
            correction = self._error(x_t - time * v)
        else:
            v, correction = self._pulled_back(velocity, x_t, time, now)
        gain = guidance_gain(time, self.max_weight)
        return x_t + dt * (v - gain * correction)

    def _error(self, estimate: Tensor) -> Tensor:
        return (self.target - estimate) * self.weights

    def _pulled_back(
        self, velocity: Velocity, x_t: Tensor, time: float, now: Tensor
    ) -> tuple[Tensor, Tensor]:
        """v, and the error times the Jacobian of the estimate x_t - t·v(x_t) by x_t."""
        with torch.enable_grad():
            x_t = x_t.detach().clone().requires_grad_()
            v = velocity(x_t, now)
            estimate = x_t - time * v
            (pulled,) = torch.autograd.grad(estimate, x_t, self._error(estimate.detach()))
        return v.detach(), pulled

    def _clean_prefix(self, x_t: Tensor) -> Tensor:
        return torch.cat((self.target[:, : self.frozen].expand(len(x_t), -1, -1),
                          x_t[:, self.frozen :]), dim=1)  # fmt: skip

    def _per_token(self, now: Tensor, clean: Tensor, horizon: int) -> Tensor:
        """[1, norms, 3, width] each → [1, norms, 3, H, width], clean for the frozen steps."""
        parts = ((clean, self.frozen), (now, horizon - self.frozen))
        return torch.cat(
            [features[:, :, :, None].expand(-1, -1, -1, count, -1) for features, count in parts],
            dim=3,
        )


def make_guide(
    guidance: Guidance,
    prefix: ActionPrefix,
    to_network: Callable[[FloatArray], FloatArray],
    config: PolicyConfig,
    action_dim: int,
) -> Guide | None:
    """A guide, on the CPU, towards a prefix in the robot's units; None where it holds no step.

    Args:
        guidance: the settings.
        prefix: absolute actions [n, action_dim].
        to_network: [n, action_dim] such actions → normalised ones, relative to the observation's
            state where the checkpoint's are: that is what anchors an old chunk anew.
        config: of the network.
        action_dim: the robot's.

    Raises:
        ValueError: another shape, a value that is not finite, or `frozen` out of range.
    """
    actions = np.asarray(prefix.actions, dtype=np.float64)
    if actions.ndim != 2 or actions.shape[1] != action_dim:
        raise ValueError(f"prefix must have shape [n, {action_dim}], got {list(actions.shape)}")
    if not np.isfinite(actions).all():
        raise ValueError("prefix has values that are not finite")
    if not 0 <= prefix.committed_steps <= len(actions):
        raise ValueError(
            f"prefix.committed_steps is {prefix.committed_steps} of {len(actions)} steps"
        )
    actions = actions[: config.horizon]
    if not len(actions):
        return None
    frozen = min(prefix.committed_steps, len(actions))
    if guidance.method == "trained" and frozen > trained_delay(config):
        logger.warning(
            "%d steps are executed before the chunk arrives, the checkpoint was trained for %d: "
            "expect a jump, or make the inference faster",
            frozen,
            trained_delay(config),
        )
        frozen = trained_delay(config)
    target = torch.zeros((1, len(actions), config.max_action_dim))
    target[0, :, :action_dim] = torch.tensor(to_network(actions), dtype=torch.float32)
    return Guide(guidance, target, frozen, config.horizon, action_dim)
