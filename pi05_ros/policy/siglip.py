"""The image tower: SigLIP So400m/14 and the projector into the language model's width.

Sources: Zhai et al. 2023 (SigLIP); openpi `models/siglip.py`, variant "So400m/14" without pooling;
LeRobot 0.6.1 `vision_tower` and `multi_modal_projector`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pi05_ros.policy.config import Sizes, VisionSize
from pi05_ros.policy.layers import LayerNorm, Linear, attend, gelu, init_, split_heads

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
