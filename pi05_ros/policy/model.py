"""π0.5 and π0: a vision-language model that denoises a chunk of actions by flow matching.

Sources: openpi `models/pi0.py` (embed_prefix, embed_suffix, compute_loss, sample_actions), the
original; LeRobot 0.6.1 `modeling_pi05.py` and `modeling_pi0.py`, whose results it reproduces;
π0 (arXiv 2410.24164), π0.5 (arXiv 2504.16054).

Time runs against the papers', as in the code: t = 1 is noise, t = 0 is the action.

Precision. In bfloat16 the image tower's blocks and projector, the token embedding and the matrices
of both experts are bfloat16 (openpi's rule; LeRobot keeps the whole tower in float32, for 0.8 GB
more). In float32 stay all norms with AdaRMS's modulations, patch and position embedding, the time
MLP and the action and state projections. Rotary angles, x_t, v_t and the Euler steps are float32
in any case.

The network's inputs must have the shapes that its sizes ask for.

The linear layer and the layer norm that the image tower and the language experts share.

The image tower: SigLIP So400m/14 and the projector into the language model's width.

Sources: Zhai et al. 2023 (SigLIP); openpi `models/siglip.py`, variant "So400m/14" without pooling;
LeRobot 0.6.1 `vision_tower` and `multi_modal_projector`.


Two Gemma experts that attend jointly: PaliGemma's language model and the action expert.

Sources: openpi `models/gemma.py` (Attention, Block, RMSNorm with `cond`), which is the original;
LeRobot 0.6.1 `pi_gemma.py` for the tensor names; π0 (arXiv 2410.24164) and π0.5 (arXiv 2504.16054).

The prefix (pictures and prompt) never looks at the suffix (state and actions). The joint attention
of both experts is therefore the same as two passes: the prefix leaves its keys and values, and the
suffix attends to those and to its own. Inference runs the first pass once and the second per
denoising step; training runs each once, and the gradient reaches the prefix through its K and V.


Flow matching in time: Euler steps from noise at t = 1 to actions at t = 0.

Sources: openpi `models/pi0.py` (posemb_sincos, sample_actions); π0 (arXiv 2410.24164).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize

if TYPE_CHECKING:
    from pi05_ros.policy.guidance import Guide

Velocity = Callable[[Tensor, Tensor], Tensor]
Mark = Callable[[str], None]
"""Called with a stage's name when the stage is done."""


def unmarked(stage: str) -> None:
    """No-op stage callback."""


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError with the name and both shapes where they differ."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")


def check_prefix(
    config: PolicyConfig, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
) -> None:
    """Raise ValueError where pictures and prompt fit neither the network nor each other."""
    if tokens.ndim != 2 or images.ndim != 5:
        raise ValueError(
            "tokens must be [B, L] and images [B, n_cameras, 3, side, side], not "
            f"{list(tokens.shape)} and {list(images.shape)}"
        )
    batch, cameras, side = len(tokens), images.shape[1], config.image_size
    check_shape("images", images, (batch, cameras, 3, side, side))
    check_shape("image_masks", image_masks, (batch, cameras))
    check_shape("token_masks", token_masks, tuple(tokens.shape))
    for name, mask in (("image_masks", image_masks), ("token_masks", token_masks)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, not {mask.dtype}")


def check_state(config: PolicyConfig, state: Tensor | None, batch: int) -> None:
    """Raise ValueError where π0 lacks its state; π0.5 has it in the prompt."""
    if config.kind == "pi05":
        return
    if state is None:
        raise ValueError("π0 needs the state [B, max_state_dim]")
    check_shape("state", state, (batch, config.max_state_dim))


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


EPSILON = 1e-6


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
        x = x + self.out(attend(split_heads(q, d), split_heads(k, d), split_heads(v, d)))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class VisionTower(nn.Module):
    """Pictures become tokens of the language model's width, one per patch, row by row."""

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
        """[N, 3, side, side] in [-1, 1] → [N, tokens, vlm width], which is used unscaled."""
        # Patches and positions stay in float32 when the blocks do not (openpi, both versions).
        x = self.patch(images.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x = (x + self.position).to(self.projector.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.projector(self.post_norm(x))


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


class PaliGemmaWithExpert(nn.Module):
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


def sinusoidal_embedding(times: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """[N] times → [N, width] float32: all sines, then all cosines, of geometric periods."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=times.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2 * math.pi * times.to(torch.float64)[:, None] / period
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(torch.float32)


class Schedule(NamedTuple):
    """The times of the Euler steps and all that the network makes of them alone."""

    times: tuple[float, ...]
    dt: float
    """Below 0."""
    features: Tensor
    """[N + 1, ...]: time features at `times`, and last at t = 0."""


def make_schedule(
    time_features: Callable[[Tensor], Tensor], num_steps: int, device: torch.device
) -> Schedule:
    """Equal steps. Weights that change afterwards do not change it.

    Raises:
        ValueError: num_steps below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    dt = -1.0 / num_steps
    times = tuple(1.0 + step * dt for step in range(num_steps))
    # a guide may differentiate, and what inference mode has made cannot be
    with torch.inference_mode(False), torch.no_grad():
        features = time_features(torch.tensor([*times, 0.0], device=device))
    return Schedule(times, dt, features)


def integrate(
    velocity: Velocity, x_t: Tensor, schedule: Schedule, guide: Guide | None = None
) -> Tensor:
    """[B, H, D] noise → normalised actions; `guide` pulls them towards those of a chunk before."""
    *features, clean = schedule.features.split(1)
    for time, now in zip(schedule.times, features, strict=True):
        if guide is None:
            x_t = x_t + schedule.dt * velocity(x_t, now)
        else:
            x_t = guide.step(velocity, x_t, time, schedule.dt, now, clean)
    return x_t


# `action_` is in the projections' names, and not in `experts.action.`.
FLOAT32_PARTS = ("norm", "modulation", "patch", "position", "action_", "time_", "state_")


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the named parameter has when the model runs in `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32_PARTS) else dtype


class Prefix(NamedTuple):
    """All that the denoising steps need of pictures and prompt."""

    cache: list[KeyValue]
    suffix_angles: Rotary
    suffix_mask: Tensor | None
    last_hidden: Tensor | None = None
    """[B, T, vlm width], only where `encode_prefix` was asked for it."""


class Pi0(nn.Module):
    """The network of π0.5 (AdaRMS, state in the prompt) or π0 (state token), by `config.kind`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptive = config.kind == "pi05"
        sizes = config.sizes
        self.vision = VisionTower(sizes)
        self.embedder = nn.Embedding(sizes.vocab, sizes.vlm.width)
        nn.init.normal_(self.embedder.weight, std=sizes.vlm.width**-0.5)
        self.experts = PaliGemmaWithExpert(sizes.vlm, sizes.exp, adaptive=self.adaptive)
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

    def embed_prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of every camera in order, then the prompt: [B, T, width], and [B, T] valid."""
        return self._join(self.encode_images(images), image_masks, tokens, token_masks)

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, n_cameras, 3, side, side] → [B, n_cameras · image tokens, width], unscaled."""
        batch, cameras = images.shape[:2]
        if cameras == 0:
            return images.new_zeros((batch, 0, self.config.sizes.vlm.width))
        features: Tensor = self.vision(images.flatten(0, 1))
        return features.unflatten(0, (batch, cameras)).flatten(1, 2)

    def _join(
        self, features: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        # text embeddings are scaled by sqrt(width), image features are not
        text = self.embedder(tokens).float() * math.sqrt(self.config.sizes.vlm.width)
        seen = image_masks.repeat_interleave(
            self.config.sizes.image_tokens, dim=1, output_size=features.shape[1]
        )
        return torch.cat((features.float(), text), dim=1), torch.cat((seen, token_masks), dim=1)

    def encode_prefix(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        pack: bool = True,
        last_hidden: bool = False,
        mark: Mark = unmarked,
    ) -> Prefix:
        """Run pictures and prompt once; `denoise` can then be called any number of times.

        Args:
            images: [B, n_cameras, 3, side, side] in [-1, 1].
            image_masks: [B, n_cameras] bool, False for a missing camera.
            tokens: [B, L] int64.
            token_masks: [B, L] bool, False for padding.
            pack: leave out the cameras and tokens that are masked in the whole batch. Nobody
                attends to them and they advance no position, so the result is the same.
            last_hidden: also compute the language model's last hidden state.
            mark: told when "vision" and "prefix" are done.

        Raises:
            ValueError: shapes that do not fit the network or each other; nothing but padding.
        """
        check_prefix(self.config, images, image_masks, tokens, token_masks)
        if pack:
            used, kept = image_masks.any(0), token_masks.any(0)
            images, image_masks = images[:, used], image_masks[:, used]
            tokens, token_masks = tokens[:, kept], token_masks[:, kept]
            if images.shape[1] + tokens.shape[1] == 0:
                raise ValueError("every camera and every token is masked: nothing to look at")
        features = self.encode_images(images)
        mark("vision")
        masked = not (bool(image_masks.all()) and bool(token_masks.all()))
        prefix = self.encode_tokens(
            features, image_masks, tokens, token_masks, masked=masked, last_hidden=last_hidden
        )
        mark("prefix")
        return prefix

    def encode_tokens(
        self,
        features: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        *,
        masked: bool = True,
        last_hidden: bool = False,
    ) -> Prefix:
        """`encode_prefix` behind the image tower; it never waits for the device.

        Args:
            features: [B, n_cameras · image tokens, width] from `encode_images`.
            image_masks, tokens, token_masks, last_hidden: see `encode_prefix`.
            masked: whether the masks have a False; without one, attention needs no mask.
        """
        embeddings, valid = self._join(features, image_masks, tokens, token_masks)
        # Padding does not advance the position.
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        head_dim = self.config.sizes.vlm.head_dim
        # The prefix is one block: every valid token is seen by every token.
        cache, hidden = self.experts.prefix(
            embeddings,
            rotary(positions, head_dim),
            valid[:, None, None, :] if masked else None,
            last_hidden,
        )
        length = self.config.horizon + (not self.adaptive)
        suffix_positions = valid.sum(1, keepdim=True) + torch.arange(length, device=valid.device)
        return Prefix(
            cache,
            rotary(suffix_positions, head_dim),
            self._suffix_mask(valid, length, masked),
            hidden,
        )

    def _suffix_mask(self, valid: Tensor, length: int, masked: bool) -> Tensor | None:
        """Broadcastable to [B, 1, S, T + S]; None where every suffix token sees everything.

        Actions are one block, and so is π0's state before them.
        """
        seen = torch.cat((valid, valid.new_ones(len(valid), length)), dim=1)
        if self.adaptive:
            return seen[:, None, None, :] if masked else None
        order = torch.arange(valid.shape[1] + length, device=valid.device) - valid.shape[1]
        starts = (order == 0) | (order == 1)
        return block_mask(seen, starts)[:, :, valid.shape[1] :]

    def embed_time(self, times: Tensor) -> Tensor:
        """[N] → [N, width]: π0.5's AdaRMS condition, or π0's plain sinusoid."""
        config = self.config
        embedding = sinusoidal_embedding(
            times, config.sizes.exp.width, config.min_period, config.max_period
        )
        if not self.adaptive:
            return embedding
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))

    def time_features(self, times: Tensor) -> Tensor:
        """Everything that depends on the time alone, for [N] times at once.

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
        time = time_features.to(actions.dtype)[:, None].expand_as(actions)
        mixed = self.action_time_mlp_in(torch.cat((actions, time), dim=-1))
        return torch.cat(
            (self.state_proj(state)[:, None], self.action_time_mlp_out(F.silu(mixed))), dim=1
        )

    def denoise(
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
        hidden = self.experts.suffix(
            self.embed_suffix(x_t, time_features, state),
            prefix.cache,
            prefix.suffix_angles,
            prefix.suffix_mask,
            time_features if self.adaptive else None,
        )
        return self.action_out_proj(hidden[:, -self.config.horizon :]).float()

    def schedule(self, num_steps: int) -> Schedule:
        """All that sampling in `num_steps` Euler steps needs of the times alone."""
        return make_schedule(self.time_features, num_steps, self.device)

    @torch.no_grad()
    def sample_actions(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int = 10,
        *,
        generator: torch.Generator | None = None,
        pack: bool = True,
        guide: Guide | None = None,
        schedule: Schedule | None = None,
        mark: Mark = unmarked,
    ) -> Tensor:
        """Integrate from noise at t = 1 to actions at t = 0 in equal Euler steps.

        Args:
            images, image_masks, tokens, token_masks, pack: see `encode_prefix`.
            state: [B, max_state_dim], π0 alone.
            noise: [B, H, action dim]; drawn from `generator` where it is not given.
            num_steps: Euler steps.
            guide: pulls the actions towards those of a chunk before.
            schedule: from `schedule`, made once for many calls, instead of `num_steps`.
            mark: told when "vision", "prefix" and "denoise" are done.

        Returns:
            [B, H, action dim] normalised actions, float32, not clipped.

        Raises:
            ValueError: shapes that do not fit, a missing state, num_steps below 1.
        """
        if schedule is None:
            schedule = self.schedule(num_steps)
        check_prefix(self.config, images, image_masks, tokens, token_masks)
        check_state(self.config, state, len(tokens))
        # the guide may differentiate, and what inference mode has made cannot be
        with torch.inference_mode(guide is None or not guide.differentiates), torch.no_grad():
            x_t = self._noise(len(tokens), noise, generator)
            state = None if state is None else state.clone()
            prefix = self.encode_prefix(images, image_masks, tokens, token_masks, pack, mark=mark)
            x_t = integrate(partial(self.denoise, prefix, state=state), x_t, schedule, guide)
        mark("denoise")
        return x_t

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
            actions: [B, H, action dim] normalised, padded with zeros.
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
        check_prefix(self.config, images, image_masks, tokens, token_masks)
        batch = len(tokens)
        check_state(self.config, state, batch)
        check_shape("actions", actions, self._chunk_shape(batch))
        actions = actions.to(torch.float32)
        noise = self._noise(batch, noise, None)
        time = self._draw_time(batch) if time is None else time.to(torch.float32)
        check_shape("time", time, (batch,))
        t = time[:, None, None]
        prefix = self.encode_prefix(images, image_masks, tokens, token_masks)
        velocity = self.denoise(
            prefix, t * noise + (1 - t) * actions, self.time_features(time), state
        )
        error = (velocity - (noise - actions)).square()
        return error.mean() if reduction == "mean" else error

    def _draw_time(self, batch: int) -> Tensor:
        config = self.config
        alpha = torch.tensor(config.time_alpha, device=self.device)
        beta = torch.tensor(config.time_beta, device=self.device)
        draw = torch.distributions.Beta(alpha, beta).sample((batch,))
        return draw * config.time_scale + config.time_offset

    def _noise(self, batch: int, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        shape = self._chunk_shape(batch)
        if noise is None:
            return torch.randn(shape, generator=generator, device=self.device)
        check_shape("noise", noise, shape)
        return noise.to(torch.float32)

    def _chunk_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.config.horizon, self.config.max_action_dim)
