"""Attention on the CPU in bfloat16, which has its own path.

Faults: heads that attend to another's keys, a mask that masks nothing, gradients that differ from
those of the fused kernel.
"""

from __future__ import annotations

import pytest
import torch

from pi05_ros.policy.model import attend, repeat_heads


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_both_paths_agree(kv_heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    query, key, value = draw(2, 4, 5, 8), draw(2, kv_heads, 7, 8), draw(2, kv_heads, 7, 8)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    weight = draw(2, 5, 32)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.clone().to(dtype).requires_grad_() for x in (query, key, value))
        out = attend(q, k, v, mask if masked else None)
        assert out.dtype == dtype
        (out.float() * weight.float()).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for steps, fused in zip(*results, strict=True):
        assert steps is not None and fused is not None
        torch.testing.assert_close(steps.float(), fused, atol=0.06, rtol=0.02)
        error = (steps.float() - fused).square().mean() / fused.square().mean()
        assert error < 1e-4


@pytest.mark.parametrize(("length", "copied"), [(33, True), (1, True), (32, False), (34, False)])
def test_shared_heads_are_copied_where_cudas_kernel_is_doubtful(length: int, copied: bool) -> None:
    """Fault: rows of stride 0 at lengths of 32 n + 1, which CUDA's kernel may read wrongly."""
    x = torch.randn(2, 1, length, 8)
    repeated = repeat_heads(x, 4)
    assert repeated.is_contiguous() is copied
    assert torch.equal(repeated, x.expand(2, 4, length, 8))
