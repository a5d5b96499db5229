"""Optimisers; faults: parameters updated twice or never, rates that jump, averages off by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pi05_lab.training.config import StageConfig
from pi05_lab.training.optim import AveragedWeights, learning_rate, make_optimizers


def stage(**values: Any) -> StageConfig:
    defaults: dict[str, Any] = {"name": "a", "losses": {"flow": 1.0}, "steps": 10}
    return StageConfig(**(defaults | values))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser(kind: str) -> None:
    names = {
        "network.experts.vlm.layers.0.qkv.weight": (8, 4),
        "network.vision.layers.0.qkv.bias": (8,),
        "network.vision.patch.weight": (4, 3, 2, 2),
        "network.embedder.weight": (9, 4),
        "network.experts.action.modulation.weight": (12, 4),
        "network.action_in_proj.weight": (4, 4),
        "auxiliary.chunk.0.weight": (2, 4, 3),
    }
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    optimizers = make_optimizers(parameters, stage(optimizer=kind))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    rows = [
        (name_of[id(parameter)], isinstance(optimizer, torch.optim.Muon), group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _, _ in rows) == sorted(names)
    matrices = ["network.experts.vlm.layers.0.qkv.weight"] if kind == "muon" else []
    assert [name for name, is_muon, _ in rows if is_muon] == matrices
    undecayed = {name for name, _, decay in rows if not decay}
    assert undecayed == {"network.vision.layers.0.qkv.bias", "network.embedder.weight"}


@example(hold=0.9999999999999999, final=0.0, warmup=0, steps=1)
@settings(max_examples=60, deadline=None)
@given(
    hold=st.floats(0, 1),
    final=st.floats(0, 1),
    warmup=st.integers(0, 20),
    steps=st.integers(1, 200),
)
def test_the_rate_stays_between_its_ends(
    hold: float, final: float, warmup: int, steps: int
) -> None:
    """Fault: a rate above the one asked for, below 0, or that rises again after it fell."""
    settings_ = stage(lr=2.0, hold=hold, final_lr=final, warmup_steps=warmup)
    rates = [learning_rate(settings_, step, step / steps) for step in range(steps)]
    assert all(0 <= rate <= 2.0 for rate in rates)
    later = rates[warmup:]
    assert all(b <= a + 1e-12 for a, b in pairwise(later))
    if hold < 1:
        assert learning_rate(settings_, 10**6, 1.0) == pytest.approx(2.0 * final)


def test_the_rate_is_openpis() -> None:
    """openpi: linear warm-up, then a cosine from the peak to a tenth of it."""
    settings_ = stage(lr=2.5e-5, warmup_steps=1000, final_lr=0.1)
    assert learning_rate(settings_, 0, 0.0) == pytest.approx(2.5e-5 / 1001)
    assert learning_rate(settings_, 15_000, 0.5) == pytest.approx((2.5e-5 + 2.5e-6) / 2)


def test_averaged_weights() -> None:
    """Fault: an average that remembers random weights, or moves what does not learn.

    A decay of 0 keeps none: the newest weights stand.
    """
    module = nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    weights = {"weight": cast("nn.Parameter", module.weight)}
    average = AveragedWeights(weights, 0.99)
    expected = module.weight.item()
    for step, value in enumerate((1.0, 2.0, 5.0)):
        with torch.no_grad():
            module.weight.fill_(value)
            module.bias.fill_(7.0)
        average.update(step)
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
        assert module.bias.item() == 7.0
    assert module.weight.item() == 5.0
    none = AveragedWeights(weights, 0.0)
    none.update(step=50)
    with none.applied():
        assert not none.shadow and module.weight.item() == 5.0


def test_averages_on_another_device_are_the_same() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    here, there = (AveragedWeights({"w": weight}, 0.9, device) for device in ("", "cpu"))
    assert there.shadow["w"].data_ptr() != weight.data_ptr()
    for step in range(3):
        with torch.no_grad():
            weight.add_(1.0)
        here.update(step)
        there.update(step)
    assert torch.equal(here.shadow["w"], there.shadow["w"])
    there.exchange()
    assert torch.equal(weight, here.shadow["w"])


def test_compact_moments_follow_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments in bfloat16, updated in pieces; fault: small averages that stop moving."""
    monkeypatch.setattr("pi05_lab.training.optim.PIECE", 100)
    torch.manual_seed(0)
    goal = torch.randn(30, 40)
    ends = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(30, 40))
        (optimizer,) = make_optimizers({"w": weight}, stage(lr=0.02), precision)
        for _ in range(200):
            (weight - goal + 0.3 * torch.randn(30, 40)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((weight.detach(), optimizer))
    exact, compact = ends[0][0], ends[1][0]
    assert (exact - goal).square().mean().sqrt() < 0.1
    assert (compact - exact).square().mean().sqrt() < 0.01
    moments = list(ends[1][1].state.popitem()[1].values())
    assert [moment.dtype for moment in moments] == [torch.bfloat16] * 2
