"""A network of a few thousand parameters, its inputs and samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize
from pi05_ros.policy.inference import SampleInputs, Sampler, no_mark
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.prompt import Tokens


def tiny(kind: str) -> PolicyConfig:
    return PolicyConfig(
        kind=kind,
        sizes=Sizes(
            vlm=GemmaSize(width=32, depth=2, mlp_dim=64, heads=2, kv_heads=1, head_dim=16),
            exp=GemmaSize(width=32, depth=2, mlp_dim=64, heads=2, kv_heads=1, head_dim=16),
            vis=VisionSize(width=32, depth=2, heads=2, mlp_dim=64),
            vocab=64,
            image=28,
            patch=14,
        ),
        horizon=10,
        max_action_dim=8,
        max_state_dim=8,
        token_length=24,
        cameras=("a", "b", "c"),
        state_dim=4,
        action_dim=4,
    )  # fmt: skip


def tiny_network(kind: str) -> Pi0:
    """Seeded, with the gates open, which begin at zero and would hide everything behind them."""
    torch.manual_seed(0)
    network = Pi0(tiny(kind)).eval()
    if network.experts.action.modulation is not None:
        torch.nn.init.normal_(network.experts.action.modulation.weight, std=0.3)
    return network


def inputs(model: Pi0, seed: int, present: tuple[bool, ...], length: int) -> SampleInputs:
    config = model.config
    rng = torch.Generator().manual_seed(seed)
    ids = np.zeros(config.token_length, np.int64)
    ids[:length] = torch.randint(1, 64, (length,), generator=rng).numpy()
    images = torch.rand(1, 3, 3, 28, 28, generator=rng) * 2 - 1
    noise = torch.randn(1, config.horizon, config.max_action_dim, generator=rng)
    state = None if model.adaptive else torch.randn(1, config.max_state_dim, generator=rng)
    mask = np.arange(config.token_length) < length
    return SampleInputs(images, present, Tokens(ids, mask), noise, state)


def sampled(sampler: Sampler, given: SampleInputs) -> Tensor:
    with torch.inference_mode():
        return sampler.sample(given, no_mark).clone()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
