"""Sampling in few, prepared shapes, so that everything the device does is recorded beforehand.

Pictures that are not there are left out, prompts are padded to the next of a few lengths. Nobody
attends to padding and it advances no position, so the actions are those of any other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pi05_ros.policy.flow import Schedule, integrate
from pi05_ros.policy.guidance import Guide, Velocity, guidance_gain
from pi05_ros.policy.model import Pi0, Prefix
from pi05_ros.policy.recorders import Recorded, Recorder
from pi05_ros.policy.sampler import EagerSampler, SampleInputs
from pi05_ros.policy.stopwatch import Mark

TEXT_BUCKETS = (32, 64, 128, 200)
"""Prompt lengths in tokens; the network's own is always one. Multiples of 8 suit the kernels."""


class _StaticInput:
    """A tensor that stays where it is, filled by way of pinned memory if it is on a GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True) if on_gpu else self.tensor

    def fill(self, values: Tensor) -> None:
        """Take over a CPU tensor of the same shape; the caller may change it afterwards.

        The last inference must be over: its upload may still read the pinned memory before.
        """
        self._host.copy_(values)
        if self._host is not self.tensor:
            self.tensor.copy_(self._host, non_blocking=True)


class _Steering:
    """The identity guide, its target and weights in static memory: one recording serves all.

    With weights of 0 a step is exactly the unguided one.
    """

    def __init__(self, schedule: Schedule, shape: tuple[int, ...], device: torch.device) -> None:
        self._times = schedule.times
        self._target = _StaticInput(shape, torch.float32, device)
        self._pulls = _StaticInput((len(self._times), *shape), torch.float32, device)
        self._free = True

    def fill(self, guide: Guide | None) -> None:
        if guide is None:
            if not self._free:
                self._pulls.fill(torch.zeros_like(self._pulls.tensor, device="cpu"))
            self._free = True
            return
        self._target.fill(guide.target)
        gains = [guidance_gain(time, guide.max_weight) for time in self._times]
        self._pulls.fill(torch.stack([gain * guide.weights for gain in gains]))
        self._free = False

    def integrate(self, velocity: Velocity, noise: Tensor, schedule: Schedule) -> Tensor:
        x_t = noise
        features = schedule.features.split(1)
        for time, now, pull in zip(self._times, features, self._pulls.tensor, strict=False):
            v = velocity(x_t, now)
            error = self._target.tensor - torch.add(x_t, v, alpha=-time)
            x_t = torch.add(x_t, torch.addcmul(v, pull, error, value=-1.0), alpha=schedule.dt)
        return x_t


class _Tower(NamedTuple):
    images: Tensor
    features: Recorded[Tensor]


class _Plan(NamedTuple):
    """All that runs behind the image tower, for one number of pictures and tokens."""

    tokens: _StaticInput
    token_masks: _StaticInput
    prefix: Recorded[Prefix]
    chunk: Recorded[Tensor]


class BucketSampler:
    """A `Sampler` with recordings per number of pictures and bucket of prompt lengths."""

    def __init__(
        self,
        model: Pi0,
        num_steps: int,
        recorder: Recorder,
        buckets: Iterable[int] = TEXT_BUCKETS,
    ) -> None:
        """Record nothing yet, see `prepare`.

        Args:
            model: its weights must not change any more, nor move.
            num_steps: Euler steps.
            recorder: of the model's device.
            buckets: prompt lengths.
        """
        config, device = model.config, model.device
        longest = config.token_length
        self.buckets = tuple(sorted({min(bucket, longest) for bucket in buckets} | {longest}))
        self._model = model
        self._recorder = recorder
        self._eager = EagerSampler(model, num_steps)
        with torch.inference_mode(False):
            self._schedule = model.schedule(num_steps)
            shape = (1, config.horizon, config.max_action_dim)
            self._noise = _StaticInput(shape, torch.float32, device)
            self._steering = _Steering(self._schedule, shape, device)
            self._state = None
            if config.kind == "pi0":
                self._state = _StaticInput((1, config.max_state_dim), torch.float32, device)
        self._towers: dict[int, _Tower] = {}
        self._plans: dict[tuple[int, int], _Plan] = {}

    @property
    def num_steps(self) -> int:
        return len(self._schedule.times)

    def prepare(self, cameras: Iterable[int]) -> None:
        """Record every bucket for these numbers of pictures, so that no inference has to."""
        for count in cameras:
            for length in self.buckets:
                self._plan(count, length)

    # As in `_plan`: code compiled in one mode is compiled once more for the other.
    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """See `Sampler`. Without a picture, nothing is recorded."""
        present = [index for index, there in enumerate(inputs.present) if there]
        used = int(np.flatnonzero(inputs.tokens.mask).max(initial=0)) + 1
        if not present:
            return self._eager.sample(inputs, mark)
        length = next(bucket for bucket in self.buckets if bucket >= used)
        plan = self._plan(len(present), length)
        tower = self._towers[len(present)]
        guide = inputs.guide
        plan.tokens.fill(torch.from_numpy(inputs.tokens.ids[:length])[None])
        plan.token_masks.fill(torch.from_numpy(inputs.tokens.mask[:length])[None])
        self._noise.fill(inputs.noise)
        if self._state is not None and inputs.state is not None:
            self._state.fill(inputs.state)
        by_hand = guide is not None and guide.method != "identity"
        self._steering.fill(None if by_hand else guide)
        for row, index in enumerate(present):
            tower.images[:, row].copy_(inputs.images[:, index])
        tower.features.replay()
        mark("vision")
        prefix = plan.prefix.replay()
        mark("prefix")
        if by_hand and guide is not None:
            chunk = self._integrate_by_hand(prefix, guide)
        else:
            chunk = plan.chunk.replay()
        mark("denoise")
        return chunk

    def _integrate_by_hand(self, prefix: Prefix, guide: Guide) -> Tensor:
        """Guides that run the network backwards or ask for a time per token."""
        return integrate(
            partial(self._model.denoise, prefix, state=self._static_state()),
            self._noise.tensor.clone(),
            self._schedule,
            guide.to(self._model.device),
        )

    def _static_state(self) -> Tensor | None:
        return None if self._state is None else self._state.tensor

    def _tower(self, cameras: int) -> _Tower:
        if cameras not in self._towers:
            side = self._model.config.image_size
            images = torch.zeros((1, cameras, 3, side, side), device=self._model.device)
            features = self._recorder.record(partial(self._model.encode_images, images))
            self._towers[cameras] = _Tower(images, features)
        return self._towers[cameras]

    # A differentiating guide reads what is recorded here; inference mode's tensors forbid that.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _plan(self, cameras: int, length: int) -> _Plan:
        key = (cameras, length)
        if key in self._plans:
            return self._plans[key]
        device = self._model.device
        tower = self._tower(cameras)
        tokens = _StaticInput((1, length), torch.int64, device)
        masks = _StaticInput((1, length), torch.bool, device)
        # a recording's first runs must see something: a prompt of one token
        masks.tensor[:, 0] = True
        seen = torch.ones((1, cameras), dtype=torch.bool, device=device)

        # without `self`: a recording that runs the function again keeps it, and no cycle may hold
        # the weights when the policy is dropped
        model, schedule, steering = self._model, self._schedule, self._steering
        noise, state = self._noise.tensor, self._static_state()

        def encode() -> Prefix:
            return model.encode_tokens(tower.features.outputs, seen, tokens.tensor, masks.tensor)

        prefix = self._recorder.record(encode)

        def denoise() -> Tensor:
            velocity = partial(model.denoise, prefix.outputs, state=state)
            return steering.integrate(velocity, noise, schedule)

        plan = _Plan(tokens, masks, prefix, self._recorder.record(denoise))
        self._plans[key] = plan
        return plan
