"""8-bit matrix products; faults: one scale for outliers and all others, overflow, a wrong layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policy.tokenizer import small_config
from torch import nn

from pi05_ros.policy.model import Pi0
from pi05_ros.policy.quantize import Float8Linear, quantize_prefix, to_float8

RMS_BOUND = 0.04
"""e4m3 has 3 bits of mantissa: rounding is 3.6 % at most and 1.8 % rms, for either factor."""


def rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())


@settings(max_examples=50, deadline=None)
@given(
    exponent=st.integers(-30, 30),
    outlier=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_rows_of_any_size_come_back(exponent: int, outlier: float, seed: int) -> None:
    """Fault: an overflow to NaN, which e4m3 has instead of infinity."""
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rows[1] = 0
    rows[2, 5] *= outlier
    quantized, scale = to_float8(rows)
    back = quantized.float() * scale
    assert torch.isfinite(back).all() and (back[1] == 0).all()
    assert ((back - rows).abs() <= rows.abs() / 16 + rows.abs().amax(1, keepdim=True) / 2**16).all()


def test_a_layer_is_near_the_exact_one() -> None:
    """Fault: one scale for a whole matrix: a token of small values would drown."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False)
    linear.weight.data[3] *= 1000
    x = torch.randn(2, 5, 128) * torch.logspace(-3, 3, 10).reshape(2, 5, 1)
    got, exact = Float8Linear(linear)(x), linear(x).detach()
    assert got.shape == exact.shape and got.dtype == x.dtype
    assert ((got - exact).abs() <= 0.14 * (x.abs() @ linear.weight.detach().abs().t())).all()
    assert rms((got - exact)[..., 3]) < RMS_BOUND * rms(exact[..., 3])


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        Float8Linear(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="multiples of 16, not 24 → 16"):
        Float8Linear(nn.Linear(24, 16, bias=False))


def test_the_prefix_alone_is_quantised() -> None:
    """Fault: the action expert or the last layer's keys and values in 8 bits."""
    torch.manual_seed(0)
    model = Pi0(small_config()).eval()
    side = model.config.image_size
    inputs = (
        torch.rand(1, 2, 3, side, side) * 2 - 1,
        torch.ones(1, 2, dtype=torch.bool),
        torch.randint(0, 64, (1, 9)),
        torch.ones(1, 9, dtype=torch.bool),
    )
    with torch.no_grad():
        exact = model.encode_prefix(*inputs).cache
        quantize_prefix(model)
        got = model.encode_prefix(*inputs).cache
    kinds = [type(layer.out).__name__ for layer in model.experts.vlm.layers]
    assert kinds == ["Float8Linear"] * 4 + ["Linear"]
    assert all(type(layer.out).__name__ == "Linear" for layer in model.experts.action.layers)
    assert model.experts.vlm.dtype == torch.float32
    for layer, (mine, theirs) in enumerate(zip(got, exact, strict=True)):
        for name in ("key", "value"):
            error = rms(getattr(mine, name) - getattr(theirs, name)) / rms(getattr(theirs, name))
            assert error < RMS_BOUND * (layer + 1), (layer, name)
    assert rms(got[1].key - exact[1].key) > 0
