"""The network's inputs must have the shapes that its sizes ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from pi05_ros.policy.config import PolicyConfig


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
