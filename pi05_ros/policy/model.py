"""π0.5 and π0: a vision-language model that denoises a chunk of actions by flow matching.

π0-FAST is the same without the action expert; the module `next_token` has its decoding.

From top to bottom: building blocks, the SigLIP vision encoder, two Gemma experts with joint
attention, flow matching in time, and the whole network with its loss.

Sources: openpi `models/{pi0,gemma,siglip}.py`, the original; LeRobot 0.6.1 `modeling_pi05.py`,
`modeling_pi0.py` and `pi_gemma.py`, whose results it reproduces; π0 (arXiv 2410.24164), π0.5
(arXiv 2504.16054), SigLIP (arXiv 2303.15343).

Time runs against the papers', as in openpi's code: t = 1 is noise, t = 0 is the action.

Precision: in a bfloat16 model, modules keep their `float32_parts` in float32: all norms and AdaRMS
modulations, patch and position embedding, time MLP, action and state projections. The vision
encoder's blocks and projector, the token embedding and the experts' matrices are bfloat16 (openpi's
rule; LeRobot keeps the whole vision encoder in float32, for 0.8 GB more). Rotary angles, x_t, v_t
and the Euler steps are always float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize

EPSILON = 1e-6
ROPE_THETA = 10_000.0


def init_(weight: Tensor, fan_in: int) -> None:
    """LeCun initialisation: normal cut at two standard deviations, variance 1 / fan_in."""
    std = 1.0 / math.sqrt(fan_in) / 0.87962566  # the deviation of a unit normal cut at ±2
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """A linear layer that computes in its weight's dtype, so float32 and bfloat16 layers chain."""

    def reset_parameters(self) -> None:
        init_(self.weight, self.in_features)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32; the result has the input's dtype."""

    float32_parts: ClassVar = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation, with which SigLIP and Gemma were trained."""
    return F.gelu(x, approximate="tanh")


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / sqrt(head_dim)) · v over all heads, concatenated.

    Args:
        query: [B, heads, S, head_dim].
        key, value: [B, kv_heads, T, head_dim]; each kv head serves heads / kv_heads query heads.
        mask: bool, broadcastable to [B, heads, S, T], True where a query sees a key; None is all.

    Returns:
        [B, S, heads · head_dim].
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        # the fused kernel's backward pass takes twice as long there
        out = _unfused_attention(query, key, value, mask)
    else:
        group = query.shape[1] // key.shape[1]
        if group > 1:
            # `enable_gqa` would rule out CUDA's fused kernels under a mask
            key, value = repeat_heads(key, group), repeat_heads(value, group)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """[B, kv_heads, T, head_dim] → [B, kv_heads · group, T, head_dim].

    A view for one kv head, except for T = 32 n + 1: CUDA's memory-efficient kernel is reported to
    give wrong results for a stride-0 view under a mask in bfloat16 (PyTorch issue 191937).
    """
    repeated = x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
    return repeated.contiguous() if x.shape[2] % 32 == 1 else repeated


def _unfused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[B, heads, S, head_dim] as `query`; softmax in float32."""
    shape = query.shape
    # The queries that share a kv head are stacked in one matrix.
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


# ---------------------------------------------------------------------------------------- SigLIP


class VisionLayer(nn.Module):
    """Pre-norm transformer block with biases."""

    def __init__(self, size: VisionSize) -> None:
        super().__init__()
        self.head_dim = size.width // size.heads
        self.attention_norm = LayerNorm(size.width, eps=EPSILON)
        self.qkv = Linear(size.width, 3 * size.width)
        self.out = Linear(size.width, size.width)
        self.mlp_norm = LayerNorm(size.width, eps=EPSILON)
        self.up = Linear(size.width, size.mlp_dim)
        self.down = Linear(size.mlp_dim, size.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        d = self.head_dim
        x = x + self.out(attention(split_heads(q, d), split_heads(k, d), split_heads(v, d)))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class VisionEncoder(nn.Module):
    """SigLIP So400m/14 without pooling, and the projector to the language model's width."""

    float32_parts: ClassVar = ("patch", "position")

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vis.width
        self.patch = nn.Conv2d(3, width, sizes.patch, stride=sizes.patch)
        self.position = nn.Parameter(torch.empty(sizes.image_tokens, width))
        self.layers = nn.ModuleList(VisionLayer(sizes.vis) for _ in range(sizes.vis.depth))
        self.post_norm = LayerNorm(width, eps=EPSILON)
        self.projector = Linear(width, sizes.vlm.width)
        init_(self.patch.weight, 3 * sizes.patch**2)
        nn.init.zeros_(self.patch.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.position, std=width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, side, side] in [-1, 1] → [N, tokens, vlm width], one token per patch by rows."""
        x = self.patch(images.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x = (x + self.position).to(self.projector.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.projector(self.post_norm(x))


# ----------------------------------------------------------------------------------------- Gemma


class Rotary(NamedTuple):
    """Rotary embedding of every position: float32 [B, 1, S, head_dim]."""

    cos: Tensor
    """[cos, cos]."""
    sin: Tensor
    """[-sin, sin], so that x · cos + roll(x) · sin rotates the two halves."""


class KeyValue(NamedTuple):
    """One layer's keys (rotated) and values: [B, kv_heads, S, head_dim]."""

    key: Tensor
    value: Tensor


def rotary(positions: Tensor, head_dim: int) -> Rotary:
    """Rotary angles of [B, S] positions, always in float32.

    Not a buffer: `module.to(bfloat16)` would round its frequencies by up to 0.4 %, which is more
    than a radian at position 968.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[:, None, :, None].to(torch.float32) * ROPE_THETA**-exponent
    cos, sin = angle.cos(), angle.sin()
    return Rotary(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def apply_rotary(x: Tensor, angles: Rotary) -> Tensor:
    """Rotate the two halves of [B, heads, S, head_dim] against each other, in float32."""
    x32 = x.float()
    return torch.addcmul(x32 * angles.cos, x32.roll(x.shape[-1] // 2, -1), angles.sin).to(x.dtype)


def block_mask(valid: Tensor, starts: Tensor) -> Tensor:
    """Block-causal mask: a token sees the valid tokens of its own block and of earlier blocks.

    Args:
        valid: [B, T] bool, False for padding.
        starts: [T] bool, True where a new block begins.

    Returns:
        [B, 1, T, T] bool, [.., i, j] is whether i sees j. Rows of padding stay unmasked: their
        outputs are unused, and a fully masked row would be NaN.
    """
    block = starts.long().cumsum(0)
    return (block[None, :] <= block[:, None]) & valid[:, None, None, :]


def _rms(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), in float32."""

    float32_parts: ClassVar = ("weight",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the normed x, and None for the gate that `AdaRMSNorm` has."""
        return (_rms(x) * (1 + self.weight.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """x / rms(x) · (1 + scale) + shift, in float32, and the gate of the residual branch.

    Without a weight of its own: `Expert.modulations` computes scale, shift and gate of all norms.
    """

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Norm [B, S, width] by `modulation` [B or 1, 3, width]: scale, shift, gate.

        With one time per token, `modulation` is [B or 1, 3, S, width].
        """
        if modulation.ndim == 3:
            modulation = modulation[:, :, None]
        scale, shift, gate = modulation.float().unbind(1)
        return torch.addcmul(shift, _rms(x), 1 + scale).to(x.dtype), gate.to(x.dtype)


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else torch.addcmul(x, branch, gate)


class GemmaLayer(nn.Module):
    """One expert's part of a layer, before and after the joint attention; no biases."""

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

    def before_attention(
        self, x: Tensor, angles: Rotary, modulation: Tensor | None = None
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """Norm and projection: the query, key and value, and the residual gate."""
        h, gate = self.attention_norm(x, modulation)
        query, key_value = self._heads(self.qkv(h), self.query_dim, angles)
        return query, key_value, gate

    def key_value(self, x: Tensor, angles: Rotary) -> KeyValue:
        """Key and value alone: the only results of the prefix's last layer that are used."""
        h, _ = self.attention_norm(x, None)
        return self._heads(F.linear(h, self.qkv.weight[self.query_dim :]), 0, angles)[1]

    def _heads(self, x: Tensor, query_dim: int, angles: Rotary) -> tuple[Tensor, KeyValue]:
        """[B, S, query_dim + 2 · kv_dim] → query and key, rotated, and value, by heads."""
        heads = split_heads(x, self.head_dim)
        queries, keys = query_dim // self.head_dim, self.kv_dim // self.head_dim
        query_key, value = heads.split((queries + keys, keys), dim=1)
        query, key = apply_rotary(query_key, angles).split((queries, keys), dim=1)
        return query, KeyValue(key, value)

    def after_attention(
        self, x: Tensor, attended: Tensor, gate: Tensor | None, modulation: Tensor | None = None
    ) -> Tensor:
        """Output projection and MLP, each added to the residual stream (through its gate)."""
        x = _residual(x, self.out(attended), gate)
        h, gate = self.mlp_norm(x, modulation)
        gated, up = self.gate_up(h).chunk(2, dim=-1)
        return _residual(x, self.down(gelu(gated) * up), gate)


class Expert(nn.Module):
    """Gemma layers and the final norm; AdaRMS norms where `adaptive`."""

    float32_parts: ClassVar = ("modulation",)
    layers: Sequence[GemmaLayer]
    """An nn.ModuleList, under the type of its elements."""

    def __init__(self, size: GemmaSize, adaptive: bool) -> None:
        super().__init__()
        self.size = size
        layers = nn.ModuleList(GemmaLayer(size, adaptive) for _ in range(size.depth))
        self.layers = cast("Sequence[GemmaLayer]", layers)
        self.final_norm = AdaRMSNorm() if adaptive else RMSNorm(size.width)
        self.modulation: Linear | None = None
        if adaptive:
            # Two norms per layer and the final one, each with scale, shift and gate, in one matrix.
            self.modulation = Linear(size.width, (2 * size.depth + 1) * 3 * size.width)
            # As in openpi's JAX code: with gate 0, each layer begins as the identity.
            nn.init.zeros_(self.modulation.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream; the last layer is never quantised."""
        return self.layers[-1].out.weight.dtype

    def modulations(self, adarms_cond: Tensor) -> Tensor:
        """[N, width] time conditions → [N, 2 · depth + 1, 3, width]: scale, shift, gate.

        Along the second axis: attention and MLP norm of every layer, then the final norm.
        """
        if self.modulation is None:
            raise ValueError("this expert has plain norms: nothing to modulate")
        return self.modulation(adarms_cond).unflatten(-1, (-1, 3, self.size.width))


class PaliGemmaWithExpert(nn.Module):
    """PaliGemma's language model for the prefix, the action expert for the suffix.

    The prefix (images and prompt) never attends to the suffix (state and actions), so joint
    attention equals two passes: the prefix leaves its keys and values, and the suffix attends to
    those and its own. Inference runs the first pass once and the second per denoising step;
    training runs each once, and the gradient reaches the prefix through its keys and values.
    """

    action: Expert
    """Absent in π0-FAST."""

    def __init__(self, vlm: GemmaSize, action: GemmaSize | None, adaptive: bool) -> None:
        super().__init__()
        self.vlm = Expert(vlm, adaptive=False)
        if action is not None:
            self.action = Expert(action, adaptive)

    def prefix(self, x: Tensor, angles: Rotary, mask: Tensor | None) -> list[KeyValue]:
        """Every layer's keys and values of the prefix [B, T, vlm width].

        The rest of the last layer and the final norm are unused and left out.
        """
        x = x.to(self.vlm.dtype)
        cache: list[KeyValue] = []
        *first_layers, last_layer = self.vlm.layers
        for layer in first_layers:
            query, kv, _ = layer.before_attention(x, angles)
            cache.append(kv)
            x = layer.after_attention(x, attention(query, kv.key, kv.value, mask), None)
        cache.append(last_layer.key_value(x, angles))
        return cache

    def suffix(
        self,
        x: Tensor,
        cache: list[KeyValue],
        angles: Rotary,
        mask: Tensor | None,
        modulations: Tensor | None,
    ) -> Tensor:
        """[B, S, action width] against the prefix's `cache` → the same shape, finally normed.

        Args:
            x, angles: of the suffix.
            cache: from `prefix`; not changed.
            mask: bool, broadcastable to [B, 1, S, T + S]; None where everything is seen.
            modulations: [B or 1, 2 · depth + 1, 3, width], or None for plain norms.
        """
        x = x.to(self.action.dtype)
        depth = self.action.size.depth
        norms = [None] * (2 * depth + 1) if modulations is None else modulations.unbind(1)
        for index, (layer, seen) in enumerate(zip(self.action.layers, cache, strict=True)):
            query, own, gate = layer.before_attention(x, angles, norms[2 * index])
            key = torch.cat((seen.key, own.key), dim=2)
            value = torch.cat((seen.value, own.value), dim=2)
            attended = attention(query, key, value, mask)
            x = layer.after_attention(x, attended, gate, norms[2 * index + 1])
        return self.action.final_norm(x, norms[-1])[0]


# --------------------------------------------------------------------------------- flow matching


def sinusoidal_embedding(times: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """[N] times → [N, width] float32: all sines, then all cosines, of geometric periods."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=times.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2 * math.pi * times.to(torch.float64)[:, None] / period
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(torch.float32)


class Schedule(NamedTuple):
    """The times of the Euler steps and the (negative) time between them."""

    times: tuple[float, ...]
    dt: float
    features: Tensor
    """[num_steps + 1, ...]: `Pi0.time_features` of `times`, then of t = 0."""


Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, H, D], time features) → v [B, H, D]."""
Step = Callable[[Velocity, Tensor, Schedule, int], Tensor]
"""(velocity, x_t, schedule, step index) → x_t of the next time."""


def euler_step(velocity: Velocity, x_t: Tensor, schedule: Schedule, index: int) -> Tensor:
    """x_t + dt · v(x_t, t)."""
    return x_t + schedule.dt * velocity(x_t, schedule.features[index : index + 1])


def integrate(
    velocity: Velocity, noise: Tensor, schedule: Schedule, step: Step = euler_step
) -> Tensor:
    """[B, H, D] noise at t = 1 → normalised actions at t = 0."""
    x_t = noise
    for index in range(len(schedule.times)):
        x_t = step(velocity, x_t, schedule, index)
    return x_t


# ----------------------------------------------------------------------------------- the network


class Prefix(NamedTuple):
    """All that the denoising steps need of images and prompt."""

    cache: list[KeyValue]
    suffix_angles: Rotary
    suffix_mask: Tensor | None


class Pi0(nn.Module):
    """The network of π0.5 (AdaRMS, state in the prompt), π0 (state token) or π0-FAST (without an
    action expert: the methods of flow matching are not for it), by `config.kind`.
    """

    float32_parts: ClassVar = (
        "action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out",
        "state_proj", "action_time_mlp_in", "action_time_mlp_out",
    )  # fmt: skip

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptive = config.kind == "pi05"
        sizes = config.sizes
        self.vision = VisionEncoder(sizes)
        self.embedder = nn.Embedding(sizes.vocab, sizes.vlm.width)
        nn.init.normal_(self.embedder.weight, std=sizes.vlm.width**-0.5)
        exp = sizes.exp if config.has_expert else None
        self.experts = PaliGemmaWithExpert(sizes.vlm, exp, adaptive=self.adaptive)
        if not config.has_expert:
            return
        width = sizes.exp.width
        self.action_in_proj = Linear(config.max_action_dim, width)
        self.action_out_proj = Linear(width, config.max_action_dim)
        if self.adaptive:
            self.time_mlp_in = Linear(width, width)
            self.time_mlp_out = Linear(width, width)
        else:
            self.state_proj = Linear(config.max_state_dim, width)
            self.action_time_mlp_in = Linear(2 * width, width)
            self.action_time_mlp_out = Linear(width, width)

    @property
    def device(self) -> torch.device:
        return self.embedder.weight.device

    def parameter_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the named parameter in a model that runs in `dtype`."""
        module: nn.Module = self
        for part in name.split("."):
            if part in getattr(module, "float32_parts", ()):
                return torch.float32
            module = getattr(module, part)
        return dtype

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, n_cameras, 3, side, side] → [B, n_cameras · image tokens, width], unscaled."""
        batch, cameras = images.shape[:2]
        if cameras == 0:
            return images.new_zeros((batch, 0, self.config.sizes.vlm.width))
        features: Tensor = self.vision(images.flatten(0, 1))
        return features.unflatten(0, (batch, cameras)).flatten(1, 2)

    def embed_prefix(
        self, features: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of every camera in order, then the prompt: [B, T, width], and [B, T] valid."""
        # text embeddings are scaled by sqrt(width), image features are not
        text = self.embedder(tokens).float() * math.sqrt(self.config.sizes.vlm.width)
        image_valid = image_masks.repeat_interleave(
            self.config.sizes.image_tokens, dim=1, output_size=features.shape[1]
        )
        valid = torch.cat((image_valid, token_masks), dim=1)
        return torch.cat((features.float(), text), dim=1), valid

    def encode_prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> Prefix:
        """Run images and prompt once; `denoise_step` can then be called any number of times.

        Cameras and tokens that are masked in the whole batch are left out. Nothing attends to
        them and they do not advance positions, so the result is the same.

        Args:
            images: [B, n_cameras, 3, side, side] in [-1, 1].
            image_masks: [B, n_cameras] bool, False for a missing camera.
            tokens: [B, L] int64.
            token_masks: [B, L] bool, False for padding.

        Raises:
            ValueError: shapes or dtypes that do not fit; everything masked.
        """
        self._check_prefix(images, image_masks, tokens, token_masks)
        cameras, kept = image_masks.any(0), token_masks.any(0)
        images, image_masks = images[:, cameras], image_masks[:, cameras]
        tokens, token_masks = tokens[:, kept], token_masks[:, kept]
        if images.shape[1] + tokens.shape[1] == 0:
            raise ValueError("every camera and every token is masked: the prefix is empty")
        features = self.embed_images(images)
        masked = not (bool(image_masks.all()) and bool(token_masks.all()))
        return self.prefill(features, image_masks, tokens, token_masks, masked)

    def prefill(
        self,
        features: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        masked: bool = True,
    ) -> Prefix:
        """`encode_prefix` after the vision encoder; it never synchronises with the device.

        Args:
            features: [B, n_cameras · image tokens, width] from `embed_images`.
            image_masks, tokens, token_masks: see `encode_prefix`.
            masked: whether the masks have a False; without one, attention needs no mask.
        """
        embeddings, valid = self.embed_prefix(features, image_masks, tokens, token_masks)
        # padding does not advance the position
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        head_dim = self.config.sizes.vlm.head_dim
        # the prefix is one block: every token sees every valid token
        mask = valid[:, None, None, :] if masked else None
        cache = self.experts.prefix(embeddings, rotary(positions, head_dim), mask)
        length = self.config.horizon + (not self.adaptive)
        suffix_positions = valid.sum(1, keepdim=True) + torch.arange(length, device=valid.device)
        suffix_mask = self.suffix_mask(valid, length, masked)
        return Prefix(cache, rotary(suffix_positions, head_dim), suffix_mask)

    def suffix_mask(self, valid: Tensor, length: int, masked: bool) -> Tensor | None:
        """Broadcastable to [B, 1, S, T + S]; None where every suffix token sees everything.

        The actions are one block; π0's state is a block before them.
        """
        seen = torch.cat((valid, valid.new_ones(len(valid), length)), dim=1)
        if self.adaptive:
            return seen[:, None, None, :] if masked else None
        order = torch.arange(valid.shape[1] + length, device=valid.device) - valid.shape[1]
        starts = (order == 0) | (order == 1)
        return block_mask(seen, starts)[:, :, valid.shape[1] :]

    def embed_time(self, times: Tensor) -> Tensor:
        """[N] → [N, width]: π0.5's AdaRMS condition (adarms_cond), or π0's plain sinusoid."""
        config = self.config
        embedding = sinusoidal_embedding(
            times, config.sizes.exp.width, config.min_period, config.max_period
        )
        if not self.adaptive:
            return embedding
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))

    def time_features(self, times: Tensor) -> Tensor:
        """Everything that depends on the time alone, for [N] times.

        π0.5: [N, 2 · depth + 1, 3, width] modulations of the expert's norms. π0: [N, width].
        """
        embedding = self.embed_time(times)
        return self.experts.action.modulations(embedding) if self.adaptive else embedding

    def embed_suffix(self, x_t: Tensor, time_features: Tensor, state: Tensor | None) -> Tensor:
        """[B, H, action dim] → [B, H, width]; in π0 [B, 1 + H, width], with time and state."""
        actions = self.action_in_proj(x_t)
        if self.adaptive:
            return actions
        if state is None:
            raise ValueError("π0 needs the state [B, max_state_dim]")
        _check_shape("state", state, (len(x_t), self.config.max_state_dim))
        time = time_features.to(actions.dtype)[:, None].expand_as(actions)
        mixed = F.silu(self.action_time_mlp_in(torch.cat((actions, time), dim=-1)))
        return torch.cat((self.state_proj(state)[:, None], self.action_time_mlp_out(mixed)), dim=1)

    def denoise_step(
        self, prefix: Prefix, x_t: Tensor, time_features: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """The velocity v(x_t, t).

        Args:
            prefix: from `encode_prefix`.
            x_t: [B, H, action dim] noisy actions.
            time_features: of [B] times, or of one time for the whole batch; π0.5 also takes
                one per token, [B or 1, norms, 3, H, width].
            state: [B, max_state_dim], π0 alone.

        Returns:
            [B, H, action dim] float32.
        """
        suffix = self.embed_suffix(x_t, time_features, state)
        modulations = time_features if self.adaptive else None
        hidden = self.experts.suffix(suffix, *prefix, modulations)
        return self.action_out_proj(hidden[:, -self.config.horizon :]).float()

    # inference tensors would forbid to differentiate through a step
    @torch.inference_mode(False)
    @torch.no_grad()
    def schedule(self, num_steps: int) -> Schedule:
        """Equal Euler steps. Weights that change afterwards do not change it.

        Raises:
            ValueError: num_steps below 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        dt = -1.0 / num_steps
        times = tuple(1.0 + step * dt for step in range(num_steps))
        features = self.time_features(torch.tensor([*times, 0.0], device=self.device))
        return Schedule(times, dt, features)

    @torch.inference_mode()
    def sample_actions(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int = 10,
    ) -> Tensor:
        """Integrate from noise at t = 1 to actions at t = 0 in equal Euler steps.

        Args:
            images, image_masks, tokens, token_masks: see `encode_prefix`.
            state: [B, max_state_dim], π0 alone.
            noise: [B, H, action dim]; drawn where it is not given.
            num_steps: Euler steps.

        Returns:
            [B, H, action dim] normalised actions, float32, not clipped.

        Raises:
            ValueError: shapes that do not fit, a missing state, num_steps below 1.
        """
        schedule = self.schedule(num_steps)
        prefix = self.encode_prefix(images, image_masks, tokens, token_masks)
        noise = self._noise(len(tokens), noise)
        return integrate(partial(self.denoise_step, prefix, state=state), noise, schedule)

    def loss(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        actions: Tensor,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "none",
    ) -> Tensor:
        """Squared error of the velocity at x_t = t · noise + (1 - t) · actions.

        Args:
            images, image_masks, tokens, token_masks: see `encode_prefix`.
            actions: [B, H, action dim] normalised, padded with zeros.
            state: [B, max_state_dim], π0 alone.
            noise: [B, H, action dim], drawn where it is not given.
            time: [B] in (0, 1], drawn from Beta(1.5, 1) · 0.999 + 0.001 where it is not given.
            reduction: "none", or "mean" over everything, padded dimensions included (openpi).

        Returns:
            [B, H, action dim] for "none", else a scalar.

        Raises:
            ValueError: an unknown reduction, shapes that do not fit, a missing state.
        """
        if reduction not in ("none", "mean"):
            raise ValueError(f'reduction must be "none" or "mean", not {reduction!r}')
        batch = len(tokens)
        _check_shape("actions", actions, self._chunk_shape(batch))
        actions = actions.to(torch.float32)
        noise = self._noise(batch, noise)
        time = self._draw_time(batch) if time is None else time.to(torch.float32)
        _check_shape("time", time, (batch,))
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * actions
        prefix = self.encode_prefix(images, image_masks, tokens, token_masks)
        velocity = self.denoise_step(prefix, x_t, self.time_features(time), state)
        error = (velocity - (noise - actions)).square()
        return error.mean() if reduction == "mean" else error

    def _draw_time(self, batch: int) -> Tensor:
        config = self.config
        parameters = torch.tensor([config.time_alpha, config.time_beta], device=self.device)
        draw = torch.distributions.Beta(*parameters).sample((batch,))
        return draw * config.time_scale + config.time_offset

    def _noise(self, batch: int, noise: Tensor | None) -> Tensor:
        if noise is None:
            return torch.randn(self._chunk_shape(batch), device=self.device)
        _check_shape("noise", noise, self._chunk_shape(batch))
        return noise.to(torch.float32)

    def _chunk_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.config.horizon, self.config.max_action_dim)

    def _check_prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> None:
        if tokens.ndim != 2 or images.ndim != 5:
            raise ValueError(
                "tokens must be [B, L] and images [B, n_cameras, 3, side, side], not "
                f"{list(tokens.shape)} and {list(images.shape)}"
            )
        batch, cameras, side = len(tokens), images.shape[1], self.config.image_size
        _check_shape("images", images, (batch, cameras, 3, side, side))
        _check_shape("image_masks", image_masks, (batch, cameras))
        _check_shape("token_masks", token_masks, tuple(tokens.shape))
        for name, mask in (("image_masks", image_masks), ("token_masks", token_masks)):
            if mask.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, not {mask.dtype}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
