"""From prepared inputs to normalised actions, as the network's methods do it.

`buckets.BucketSampler` does the same with prepared shapes, for CUDA graphs and compiled kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pi05_ros.policy.guidance import Guide
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.stopwatch import Mark


@dataclass(frozen=True)
class SampleInputs:
    """One observation as the network takes it."""

    images: Tensor
    """[1, n_cameras, 3, side, side] in [-1, 1] on the device, in the network's order."""
    present: tuple[bool, ...]
    """[n_cameras] whether there is a picture."""
    tokens: Tokens
    noise: Tensor
    """[1, H, D] on the CPU."""
    state: Tensor | None = None
    """[1, max_state_dim] on the CPU, π0 alone."""
    guide: Guide | None = None
    """On the CPU."""


class Sampler(Protocol):
    """Runs the network on its device."""

    @property
    def num_steps(self) -> int: ...

    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """[1, H, D] normalised actions, float32, on the device.

        They are good until the next call. Ends the stages "vision", "prefix" and "denoise".
        """
        ...


class EagerSampler:
    """Operation by operation, in the shapes that come."""

    def __init__(self, model: Pi0, num_steps: int) -> None:
        """`model`'s weights must not change any more."""
        self._model = model
        self._schedule = model.schedule(num_steps)

    @property
    def num_steps(self) -> int:
        return len(self._schedule.times)

    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        device = self._model.device
        guide = None if inputs.guide is None else inputs.guide.to(device)
        return self._model.sample_actions(
            *prefix_inputs(inputs, device),
            **suffix_inputs(inputs, device),
            schedule=self._schedule,
            guide=guide,
            mark=mark,
        )


def prefix_inputs(
    inputs: SampleInputs, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, their masks, tokens and theirs, as `Pi0.sample_actions` takes them."""
    return (
        inputs.images,
        torch.tensor([inputs.present], device=device),
        torch.from_numpy(inputs.tokens.ids)[None].to(device),
        torch.from_numpy(inputs.tokens.mask)[None].to(device),
    )


def suffix_inputs(inputs: SampleInputs, device: torch.device) -> dict[str, Any]:
    """State and noise by the names that `Pi0.sample_actions` gives them."""
    state = None if inputs.state is None else inputs.state.to(device)
    return {"state": state, "noise": inputs.noise.to(device)}
