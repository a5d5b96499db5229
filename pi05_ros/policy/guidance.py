"""Real-time chunking: guide the sampler towards actions that the robot executes anyway.

Real-time chunking (arXiv 2506.07339, algorithm 1 and equations 2 to 5) in two variants, and its
trained counterpart (arXiv 2512.05964), for networks that were trained with clean prefixes.

As in `model`, time runs from t = 1, noise, to t = 0, the action; the paper's τ is 1 - t.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.model import Schedule, Velocity
from pi05_ros.types import ActionPrefix, FloatArray

logger = logging.getLogger(__name__)

GUIDANCE_METHODS = ("identity", "vjp", "trained")
GUIDANCE_SCHEDULES = ("zeros", "ones", "linear", "exp")
MAX_DELAY_KEY = "rtc_training_max_delay"
"""LeRobot's key in config.json: the longest clean prefix, in steps, that training has shown."""


@dataclass(frozen=True)
class Guidance:
    """How a chunk continues the previous one."""

    method: str = "identity"
    """identity: the error itself as correction, as LeRobot computes it; vjp: the paper's, the
    error pulled back through the network, with a backward pass per step; trained: clean prefix."""
    schedule: str = "exp"
    """How the pull decays between the committed steps and the execution horizon."""
    execution_horizon: int = 0
    """Steps of the previous chunk that pull. 0: all that remain, the paper's H - s; LeRobot's
    default is 10, too short for a delay near it."""
    max_weight: float = 10.0
    """Cap of the guidance weight, which is unbounded near t = 0 and t = 1."""

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

    def weights(self, committed: int, given: int, horizon: int) -> FloatArray:
        """[horizon] the pull to each step of a prefix of `given` steps."""
        end = min(self.execution_horizon or given, given)
        return prefix_weights(self.schedule, committed, end, horizon)

    def check(self, config: PolicyConfig) -> None:
        """Raise ValueError if the checkpoint does not support the method."""
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


def prefix_weights(
    schedule: str, committed: int, execution_horizon: int, horizon: int
) -> FloatArray:
    """[horizon] the pull of each step to the previous chunk.

    1 for the committed steps, 0 from `execution_horizon` on, and between them 0 (zeros), 1 (ones),
    a line (linear) or c·(exp(c) - 1)/(e - 1) of that line's values c (exp, equation 5).
    """
    end = min(execution_horizon, horizon)
    start = min(committed, end)
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


def identity_step(
    velocity: Velocity, x_t: Tensor, schedule: Schedule, index: int, target: Tensor, pull: Tensor
) -> Tensor:
    """Euler step with the error of the estimated actions as correction; pull 0 is unguided.

    Args:
        velocity, x_t, schedule, index: see `model.Step`.
        target: [B, H, D] normalised actions.
        pull: [1, H, D] gain times weights.
    """
    v = velocity(x_t, schedule.features[index : index + 1])
    error = target - torch.add(x_t, v, alpha=-schedule.times[index])
    return torch.add(x_t, torch.addcmul(v, pull, error, value=-1.0), alpha=schedule.dt)


@dataclass(frozen=True)
class PrefixGuidance:
    """Guides one sampling towards a prefix; `step` takes the place of `model.euler_step`."""

    method: str
    max_weight: float
    target: Tensor
    """[B, H, D] normalised actions, 0 after the prefix."""
    weights: Tensor
    """[1, H, D] the pull, 0 after the prefix and in the network's padded dimensions."""
    committed: int
    """First steps of the target, which the robot executes in any case."""

    @classmethod
    def make(
        cls, guidance: Guidance, target: Tensor, committed: int, horizon: int, dims: int
    ) -> PrefixGuidance:
        """Extend a target [B, n, D] to the horizon, n ≤ horizon; the first `dims` of D pull."""
        given = target.shape[1]
        padded = torch.nn.functional.pad(target, (0, 0, 0, horizon - given))
        pull = torch.tensor(guidance.weights(committed, given, horizon), dtype=target.dtype)
        weights = torch.zeros_like(padded[:1])
        weights[:, :, :dims] = pull[:, None]
        return cls(guidance.method, guidance.max_weight, padded, weights, committed)

    @classmethod
    def from_prefix(
        cls,
        guidance: Guidance,
        prefix: ActionPrefix,
        to_network: Callable[[FloatArray], FloatArray],
        config: PolicyConfig,
        action_dim: int,
    ) -> PrefixGuidance | None:
        """Guidance towards a prefix in robot units, on the CPU; None for an empty prefix.

        Args:
            guidance: the settings.
            prefix: absolute actions [n, action_dim].
            to_network: [n, action_dim] absolute actions → normalised ones, relative to the
                observation's state where the checkpoint's actions are.
            config: of the network.
            action_dim: of the robot.

        Raises:
            ValueError: wrong shape, a value that is not finite, `committed_steps` out of range.
        """
        actions = np.asarray(prefix.actions, dtype=np.float64)
        committed = prefix.committed_steps
        if actions.ndim != 2 or actions.shape[1] != action_dim:
            raise ValueError(f"prefix must have shape [n, {action_dim}], got {list(actions.shape)}")
        if not np.isfinite(actions).all():
            raise ValueError("prefix has values that are not finite")
        if not 0 <= committed <= len(actions):
            raise ValueError(f"prefix.committed_steps is {committed} of {len(actions)} steps")
        actions = actions[: config.horizon]
        if not len(actions):
            return None
        committed = min(committed, len(actions))
        if guidance.method == "trained" and committed > trained_delay(config):
            logger.warning(
                "inference delay of %d steps exceeds the checkpoint's %s %d: the chunk may jump at "
                "its start; make inference faster",
                committed, MAX_DELAY_KEY, trained_delay(config),
            )  # fmt: skip
            committed = trained_delay(config)
        target = torch.zeros((1, len(actions), config.max_action_dim))
        target[0, :, :action_dim] = torch.tensor(to_network(actions), dtype=torch.float32)
        return cls.make(guidance, target, committed, config.horizon, action_dim)

    def to(self, device: torch.device) -> PrefixGuidance:
        """The same guidance for a network on `device`."""
        return replace(self, target=self.target.to(device), weights=self.weights.to(device))

    def pull(self, time: float) -> Tensor:
        """[1, H, D] gain at `time` times weights."""
        return guidance_gain(time, self.max_weight) * self.weights

    def step(self, velocity: Velocity, x_t: Tensor, schedule: Schedule, index: int) -> Tensor:
        """One guided Euler step, see `model.Step`."""
        time, features = schedule.times[index], schedule.features[index : index + 1]
        if self.method == "identity":
            return identity_step(velocity, x_t, schedule, index, self.target, self.pull(time))
        if self.method == "vjp":
            v, correction = self._vjp(velocity, x_t, time, features)
            return x_t + schedule.dt * (v - guidance_gain(time, self.max_weight) * correction)
        x_t = self._with_clean_prefix(x_t)
        per_token = self._per_token_features(features, schedule.features[-1:], x_t.shape[1])
        return self._with_clean_prefix(x_t + schedule.dt * velocity(x_t, per_token))

    def _vjp(
        self, velocity: Velocity, x_t: Tensor, time: float, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """v, and the weighted error times the Jacobian of the estimate x_t - t·v(x_t) by x_t."""
        with torch.enable_grad():
            x_t = x_t.detach().clone().requires_grad_()
            v = velocity(x_t, features)
            estimate = x_t - time * v
            error = (self.target - estimate.detach()) * self.weights
            (correction,) = torch.autograd.grad(estimate, x_t, error)
        return v.detach(), correction

    def _with_clean_prefix(self, x_t: Tensor) -> Tensor:
        clean = self.target[:, : self.committed].expand(len(x_t), -1, -1)
        return torch.cat((clean, x_t[:, self.committed :]), dim=1)

    def _per_token_features(self, noisy: Tensor, clean: Tensor, horizon: int) -> Tensor:
        """[1, norms, 3, width] each → [1, norms, 3, H, width], clean for the committed steps."""
        parts = ((clean, self.committed), (noisy, horizon - self.committed))
        expanded = [part[:, :, :, None].expand(-1, -1, -1, count, -1) for part, count in parts]
        return torch.cat(expanded, dim=3)
