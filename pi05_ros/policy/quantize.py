"""Matrix products in 8-bit floats, for the prefix pass, which is bound by arithmetic.

Weights are rounded once, with a scale per output; activations as they come, with a scale per
token (Micikevicius et al., arXiv 2209.05433, e4m3). Sums are float32, results bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pi05_ros.policy.model import Pi0

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
SMALLEST_SCALE = 1e-12
"""A row of zeros has no scale of its own."""
SIZE_STEP = 16
"""The matrix kernels' sizes are multiples of it."""


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → the same in e4m3, and the scale [N, 1] float32 that brings it back."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_SCALE) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


class Float8Linear(nn.Module):
    """x · Wᵀ without a bias, both factors in e4m3."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Round `linear`'s weight.

        Raises:
            ValueError: it has a bias, or sizes that the kernels do not take.
        """
        super().__init__()
        if linear.bias is not None:
            raise ValueError("fp8 is for layers without a bias")
        if linear.in_features % SIZE_STEP or linear.out_features % SIZE_STEP:
            raise ValueError(
                f"fp8 needs sizes that are multiples of {SIZE_STEP}, not "
                f"{linear.in_features} → {linear.out_features}"
            )
        weight, scale = to_float8(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_float8(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product.unflatten(0, x.shape[:-1]).to(x.dtype)


def quantize_prefix(model: Pi0) -> None:
    """Turn the language model's matrices, but the last layer's, to `Float8Linear`, in place.

    Of the last layer only keys and values are computed, and they alone carry its rounding on.

    Raises:
        ValueError: a GPU without fp8 (before compute capability 8.9), or sizes that do not fit.
    """
    device = model.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"fp8 needs compute capability 8.9 or later, {torch.cuda.get_device_name(device)} is "
            "older; leave fp8_prefix false"
        )
    for layer in model.experts.vlm.layers[:-1]:
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(layer, name, Float8Linear(getattr(layer, name)))
