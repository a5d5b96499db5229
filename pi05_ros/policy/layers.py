"""The linear layer and the layer norm that the image tower and the language experts share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Standard deviation of a unit normal that is cut at ±2, so that `init_` gives the variance it says.
_TRUNCATED_STD = 0.87962566


def init_(weight: Tensor, fan_in: int) -> None:
    """LeCun initialisation: normal cut at two standard deviations, variance 1 / fan_in."""
    std = 1.0 / math.sqrt(fan_in) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its own weight, whatever comes in.

    So the layers that stay in float32 and those in bfloat16 can follow one another.
    """

    def reset_parameters(self) -> None:
        init_(self.weight, self.in_features)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32; the result has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation, which SigLIP and Gemma were trained with."""
    return F.gelu(x, approximate="tanh")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / sqrt(head_dim)) · v over all heads, concatenated.

    Args:
        query: [B, heads, S, head_dim].
        key, value: [B, kv_heads, T, head_dim]; each kv head serves heads / kv_heads query heads.
        mask: bool, broadcastable to [B, heads, S, T], True where a query may look; None is all.

    Returns:
        [B, S, heads · head_dim].
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        # the fused kernel's backward pass takes twice as long there
        out = _attend_in_steps(query, key, value, mask)
    else:
        group = query.shape[1] // key.shape[1]
        if group > 1:
            # `enable_gqa` would rule out CUDA's fused kernels under a mask
            key, value = repeat_heads(key, group), repeat_heads(value, group)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """[B, kv_heads, T, head_dim] → [B, kv_heads · group, T, head_dim].

    A view for one kv head, but for lengths of 32 n + 1: CUDA's memory-efficient kernel is reported
    to give wrong results for such a view under a mask in bfloat16 (PyTorch issue 191937).
    """
    repeated = x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
    return repeated.contiguous() if x.shape[2] % 32 == 1 else repeated


def _attend_in_steps(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Without the fused kernel; [B, heads, S, head_dim] as `query`, softmax in float32."""
    shape = query.shape
    # The queries that share a kv head stand below one another in one matrix.
    stacked = (query * shape[-1] ** -0.5).reshape(shape[0], key.shape[1], -1, shape[-1])
    logits = stacked @ key.transpose(-1, -2)
    if mask is not None:
        by_head = logits.view(*shape[:3], -1).masked_fill(~mask, torch.finfo(logits.dtype).min)
        logits = by_head.view_as(logits)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(shape)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, heads · head_dim] → [B, heads, S, head_dim]."""
    return torch.unflatten(x, -1, (-1, head_dim)).transpose(1, 2)
