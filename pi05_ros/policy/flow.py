"""Flow matching in time: Euler steps from noise at t = 1 to actions at t = 0.

Sources: openpi `models/pi0.py` (posemb_sincos, sample_actions); π0 (arXiv 2410.24164).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pi05_ros.policy.guidance import Guide, Velocity


def sinusoidal_embedding(times: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """[N] times → [N, width] float32: all sines, then all cosines, of geometric periods."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=times.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2 * math.pi * times.to(torch.float64)[:, None] / period
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(torch.float32)


class Schedule(NamedTuple):
    """The times of the Euler steps and all that the network makes of them alone."""

    times: tuple[float, ...]
    dt: float
    """Below 0."""
    features: Tensor
    """[N + 1, ...]: time features at `times`, and last at t = 0."""


def make_schedule(
    time_features: Callable[[Tensor], Tensor], num_steps: int, device: torch.device
) -> Schedule:
    """Equal steps. Weights that change afterwards do not change it.

    Raises:
        ValueError: num_steps below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    dt = -1.0 / num_steps
    times = tuple(1.0 + step * dt for step in range(num_steps))
    # a guide may differentiate, and what inference mode has made cannot be
    with torch.inference_mode(False), torch.no_grad():
        features = time_features(torch.tensor([*times, 0.0], device=device))
    return Schedule(times, dt, features)


def integrate(
    velocity: Velocity, x_t: Tensor, schedule: Schedule, guide: Guide | None = None
) -> Tensor:
    """[B, H, D] noise → normalised actions; `guide` pulls them towards those of a chunk before."""
    *features, clean = schedule.features.split(1)
    for time, now in zip(schedule.times, features, strict=True):
        if guide is None:
            x_t = x_t + schedule.dt * velocity(x_t, now)
        else:
            x_t = guide.step(velocity, x_t, time, schedule.dt, now, clean)
    return x_t
