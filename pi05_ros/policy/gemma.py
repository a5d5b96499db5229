"""Two Gemma experts that attend jointly: PaliGemma's language model and the action expert.

Sources: openpi `models/gemma.py` (Attention, Block, RMSNorm with `cond`), which is the original;
LeRobot 0.6.1 `pi_gemma.py` for the tensor names; π0 (arXiv 2410.24164) and π0.5 (arXiv 2504.16054).

The prefix (pictures and prompt) never looks at the suffix (state and actions). The joint attention
of both experts is therefore the same as two passes: the prefix leaves its keys and values, and the
suffix attends to those and to its own. Inference runs the first pass once and the second per
denoising step; training runs each once, and the gradient reaches the prefix through its K and V.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.policy.config import GemmaSize
from pi05_ros.policy.layers import Linear, attend, gelu, split_heads

EPSILON = 1e-6
ROPE_THETA = 10_000.0


class Rotary(NamedTuple):
    """Rotation of every position: float32 [B, 1, S, head_dim]."""

    cos: Tensor
    """Of the angles, twice."""
    sin: Tensor
    """Of the angles: first negative, for what the second half adds to the first, then positive."""


class KeyValue(NamedTuple):
    """One layer's keys (rotated) and values: [B, kv_heads, S, head_dim]."""

    key: Tensor
    value: Tensor


def rotary(positions: Tensor, head_dim: int) -> Rotary:
    """Rotary angles of [B, S] positions, always in float32.

    They come from no buffer: `module.to(bfloat16)` would round a buffer's frequencies by up to
    0.4 %, which is more than a radian at position 968.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[:, None, :, None].to(torch.float32) * ROPE_THETA**-exponent
    cos, sin = angle.cos(), angle.sin()
    return Rotary(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Tensor, angles: Rotary) -> Tensor:
    """Rotate the two halves of [B, heads, S, head_dim] against each other, in float32."""
    x32 = x.float()
    return torch.addcmul(x32 * angles.cos, x32.roll(x.shape[-1] // 2, -1), angles.sin).to(x.dtype)


def block_mask(valid: Tensor, starts: Tensor) -> Tensor:
    """Who may look at whom: a token sees the valid tokens of its own block and of those before.

    Args:
        valid: [B, T] bool, False for padding.
        starts: [T] bool, True where a new block begins.

    Returns:
        [B, 1, T, T] bool, [.., i, j] says whether i sees j. Rows of padding are not blanked: no
        valid token reads their results, and a row that sees nothing has no softmax.
    """
    block = starts.long().cumsum(0)
    return (block[None, :] <= block[:, None]) & valid[:, None, None, :]


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), in float32; the weight lies around 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the normed x, and no gate."""
        return (_rms(x) * (1 + self.weight.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """x / rms(x) · (1 + scale) + shift, in float32, and the gate of the residual branch.

    It has no weight of its own: scale, shift and gate depend on the time alone, and
    `Expert.modulations` computes those of all norms together.
    """

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Norm [B, S, width] by `modulation` [B or 1, 3, width]: scale, shift, gate.

        With one time per token it is [B or 1, 3, S, width].
        """
        if modulation.ndim == 3:
            modulation = modulation[:, :, None]
        scale, shift, gate = modulation.float().unbind(1)
        return torch.addcmul(shift, _rms(x), 1 + scale).to(x.dtype), gate.to(x.dtype)


def _rms(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else torch.addcmul(x, branch, gate)


class GemmaLayer(nn.Module):
    """One expert's part of one layer: everything but the attention itself, without biases."""

    def __init__(self, size: GemmaSize, adaptive: bool) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.query_dim = size.heads * size.head_dim
        self.kv_dim = size.kv_heads * size.head_dim
        self.attention_norm = AdaRMSNorm() if adaptive else RMSNorm(size.width)
        self.qkv = Linear(size.width, self.query_dim + 2 * self.kv_dim, bias=False)
        self.out = Linear(self.query_dim, size.width, bias=False)
        self.mlp_norm = AdaRMSNorm() if adaptive else RMSNorm(size.width)
        self.gate_up = Linear(size.width, 2 * size.mlp_dim, bias=False)
        self.down = Linear(size.mlp_dim, size.width, bias=False)

    def project(
        self, x: Tensor, angles: Rotary, modulation: Tensor | None = None
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """Norm and project; returns the query, key and value, and the gate."""
        h, gate = self.attention_norm(x, modulation)
        query, key, value = self._heads(self.qkv(h), self.query_dim, angles)
        return query, KeyValue(key, value), gate

    def project_key_value(self, x: Tensor, angles: Rotary) -> KeyValue:
        """Key and value alone: all that is needed of the prefix's last layer."""
        h, _ = self.attention_norm(x, None)
        _, key, value = self._heads(F.linear(h, self.qkv.weight[self.query_dim :]), 0, angles)
        return KeyValue(key, value)

    def _heads(self, x: Tensor, query_dim: int, angles: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, query_dim + 2 · kv_dim] → query and key, rotated, and value, by heads."""
        heads = split_heads(x, self.head_dim)
        queries, keys = query_dim // self.head_dim, self.kv_dim // self.head_dim
        turned, value = heads.split((queries + keys, keys), dim=1)
        query, key = rotate(turned, angles).split((queries, keys), dim=1)
        return query, key, value

    def finish(
        self, x: Tensor, attended: Tensor, gate: Tensor | None, modulation: Tensor | None = None
    ) -> Tensor:
        """Output projection and MLP, each added to the residual stream (through its gate)."""
        x = _residual(x, self.out(attended), gate)
        h, gate = self.mlp_norm(x, modulation)
        gated, up = self.gate_up(h).chunk(2, dim=-1)
        return _residual(x, self.down(gelu(gated) * up), gate)


class Expert(nn.Module):
    """A stack of layers and the final norm; `adaptive` where the norms depend on the time."""

    def __init__(self, size: GemmaSize, adaptive: bool) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(GemmaLayer(size, adaptive) for _ in range(size.depth))
        self.final_norm = AdaRMSNorm() if adaptive else RMSNorm(size.width)
        self.modulation: Linear | None = None
        if adaptive:
            # Two norms a layer and the final one, each with scale, shift and gate, in one matrix.
            self.modulation = Linear(size.width, (2 * size.depth + 1) * 3 * size.width)
            # As in openpi's JAX code: gate 0, so that each layer begins as the identity.
            nn.init.zeros_(self.modulation.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the residual stream runs in; the last layer is never quantised."""
        return self.stack[-1].out.weight.dtype

    @property
    def stack(self) -> list[GemmaLayer]:
        """The layers under their own type, which a ModuleList forgets."""
        return cast("list[GemmaLayer]", list(self.layers))

    def modulations(self, condition: Tensor) -> Tensor:
        """[N, width] time conditions → [N, 2 · depth + 1, 3, width]: scale, shift, gate.

        Along the second axis: attention and MLP norm of every layer, then the final norm.
        """
        if self.modulation is None:
            raise ValueError("this expert has plain norms: nothing to modulate")
        return self.modulation(condition).unflatten(-1, (-1, 3, self.size.width))


class TwoExperts(nn.Module):
    """PaliGemma's language model for the prefix, the action expert for the suffix."""

    def __init__(self, vlm: GemmaSize, action: GemmaSize, adaptive: bool) -> None:
        super().__init__()
        self.vlm = Expert(vlm, adaptive=False)
        self.action = Expert(action, adaptive)

    def prefix(
        self, x: Tensor, angles: Rotary, mask: Tensor | None, last_hidden: bool = False
    ) -> tuple[list[KeyValue], Tensor | None]:
        """Run the prefix [B, T, vlm width] and keep every layer's keys and values.

        The rest of the last layer and the final norm feed nobody, and are left out unless
        `last_hidden` asks for their result [B, T, vlm width].
        """
        x = x.to(self.vlm.dtype)
        cache: list[KeyValue] = []
        *first_layers, last_layer = self.vlm.stack
        for layer in first_layers:
            query, kv, _ = layer.project(x, angles)
            cache.append(kv)
            x = layer.finish(x, attend(query, kv.key, kv.value, mask), None)
        if not last_hidden:
            cache.append(last_layer.project_key_value(x, angles))
            return cache, None
        query, kv, _ = last_layer.project(x, angles)
        cache.append(kv)
        x = last_layer.finish(x, attend(query, kv.key, kv.value, mask), None)
        return cache, self.vlm.final_norm(x)[0]

    def suffix(
        self,
        x: Tensor,
        cache: list[KeyValue],
        angles: Rotary,
        mask: Tensor | None,
        modulations: Tensor | None,
    ) -> Tensor:
        """Run the suffix against the prefix's keys and values, which it does not change.

        Args:
            x: [B, S, action width].
            cache: from `prefix`.
            angles: of the suffix positions.
            mask: bool, broadcastable to [B, 1, S, T + S]; None where everything is seen.
            modulations: [B or 1, 2 · depth + 1, 3, width], or None for plain norms.

        Returns:
            [B, S, action width] after the final norm.
        """
        x = x.to(self.action.dtype)
        depth = self.action.size.depth
        norms = [None] * (2 * depth + 1) if modulations is None else modulations.unbind(1)
        for index, (layer, seen) in enumerate(zip(self.action.stack, cache, strict=True)):
            query, own, gate = layer.project(x, angles, norms[2 * index])
            key = torch.cat((seen.key, own.key), dim=2)
            value = torch.cat((seen.value, own.value), dim=2)
            x = layer.finish(x, attend(query, key, value, mask), gate, norms[2 * index + 1])
        return self.action.final_norm(x, norms[-1])[0]
