"""Losses that help a small network to see and to listen, read from inside it, and never saved.

A policy that starts from nothing has to find out from the actions alone which of three cubes is
meant and where it is. These heads ask for that directly: where the named object is, at the word
that names it; what each joint will do, at the token that states it; where all objects are, from the
pictures alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_lab.training.batches import Batch
from pi05_lab.training.config import AuxLossConfig, ConfigError
from pi05_lab.training.initial import answer
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.model import Pi0

_POSITION_BETA = 0.1
_CHUNK_BETA = 0.2
"""Where the smooth L1 losses turn from square to linear, in standardised or normalised units."""


@dataclass
class Seen:
    """What the network computed on the way to its prefix."""

    hidden: list[Tensor] = field(default_factory=list)
    """Per layer of the language model: its input [B, T, width]."""
    features: Tensor | None = None
    """[P · n_cameras, tokens, width] of the image tower."""


@contextmanager
def watch(network: Pi0, rows: int, repeats: int = 1, insulate: bool = False) -> Iterator[Seen]:
    """Keep the prefix's hidden states while the network runs, without changing its result.

    Args:
        network: of any size.
        rows: of the batch.
        repeats: every picture stands in so many rows that follow each other; the tower sees it
            once.
        insulate: no gradient leaves the last layer's keys and values for what lies below.
    """
    seen = Seen()
    last = network.experts.vlm.stack[-1].attention_norm

    def enter_tower(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        images = args[0]
        return (images.unflatten(0, (rows // repeats, repeats, -1))[:, 0].flatten(0, 1),)

    def leave_tower(_: nn.Module, args: tuple[Tensor], features: Tensor) -> Tensor:
        seen.features = features
        pictures = features.unflatten(0, (rows // repeats, -1))
        return pictures.repeat_interleave(repeats, dim=0).flatten(0, 1)

    def enter_layer(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.hidden.append(args[0])
        return (args[0].detach(), *args[1:]) if insulate and norm is last else None

    hooks = [
        network.vision.register_forward_pre_hook(enter_tower),
        network.vision.register_forward_hook(leave_tower),
        *(
            layer.attention_norm.register_forward_pre_hook(enter_layer)
            for layer in network.experts.vlm.stack
        ),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class SceneHead(nn.Module):
    """All objects' positions from one camera's tokens, each at the tokens that answer its name.

    A name's answer is a fixed rearrangement of its embedding. So the tower learns to put the answer
    to "red" where the red cube is, and a fresh language model, whose first queries look for answers
    (`initial.prepare_fresh`), finds it there.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(width**-0.5))
        self.out = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, names: Tensor) -> Tensor:
        """[P, tokens, width] and embedded names [objects, width] → [P, objects, 3]."""
        logits = _rms(answer(names)) @ _rms(tokens).mT * self.scale
        return self.out(logits.float().softmax(-1).to(tokens.dtype) @ tokens).float()


class PixelHead(nn.Module):
    """In which patch of a camera's picture each object is, and where in the patch.

    By the same answers as `SceneHead`: which tokens answer an object's name, or none of them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(width**-0.5))
        self.absent = nn.Parameter(torch.zeros(()))
        self.within = nn.Linear(width, 2)

    def loss(self, tokens: Tensor, names: Tensor, pixels: Tensor) -> Tensor:
        """Mean over the objects whose place, or absence, is known.

        Args:
            tokens: [N, side · side, width] of one picture each.
            names: [objects, width], embedded.
            pixels: [N, objects, 2] as in `Batch.pixels`.
        """
        side = math.isqrt(tokens.shape[1])
        logits = (_rms(answer(names)) @ _rms(tokens).mT * self.scale).float()
        logits = torch.cat((logits, self.absent.expand(*logits.shape[:2], 1)), dim=-1)
        known = pixels.isfinite().all(-1)
        seen = known & (pixels >= 0).all(-1)
        scaled = torch.where(seen[..., None], pixels, 0.0).clamp(max=1 - 1e-6) * side
        column, row = scaled.floor().long().unbind(-1)
        patch = row * side + column
        wanted = torch.where(seen, patch, side * side)
        where = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        at = tokens.gather(1, patch[..., None].expand(-1, -1, tokens.shape[-1]))
        offset = F.smooth_l1_loss(
            self.within(_rms(at)).float(), scaled.frac() - 0.5, beta=_POSITION_BETA,
            reduction="none",
        ).sum(-1)  # fmt: skip
        error = where * known.flatten() + (offset * seen).flatten()
        return error.sum() / known.sum().clamp(min=1)


class ChunkHead(nn.Module):
    """What joint j will do over the horizon, from the hidden state at the token of its state."""

    def __init__(self, width: int, joints: int, horizon: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(joints, width, horizon) * 0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, joints, width] → [B, horizon, joints]."""
        return torch.einsum("bjw,jwh->bhj", _rms(hidden), self.weight).float()


class NameHead(nn.Module):
    """Where the named object is, from the hidden state at the word that names it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width] → [B, 3]."""
        result: Tensor = self.out(_rms(hidden)).float()
        return result


class Helpers(nn.Module):
    """The heads and the losses they give."""

    def __init__(
        self,
        config: PolicyConfig,
        settings: AuxLossConfig,
        losses: set[str],
        name_ids: Sequence[int] = (),
    ) -> None:
        """Make the heads that `losses` need.

        Args:
            config: the network's.
            settings: where the heads read.
            losses: those of all stages.
            name_ids: the token that names each object; for the losses scene and pixels.

        Raises:
            ConfigError: a layer or camera that the network does not have, or a robot whose
                actions are not as many as its states.
        """
        super().__init__()
        self.settings = settings
        self.joints = config.action_dim or 0
        width = config.sizes.vlm.width
        self.register_buffer("name_ids", torch.tensor(name_ids), persistent=False)
        if "pixels" in losses:
            self.pixels = PixelHead(width)
        if "scene" in losses:
            if settings.scene_camera not in config.cameras:
                raise ConfigError(
                    f"helpers.scene_camera {settings.scene_camera!r} is not one of the network's "
                    f"cameras: {', '.join(config.cameras)}"
                )
            self._camera = config.cameras.index(settings.scene_camera)
            self.scene = SceneHead(width)
        for key in ("position_layers", "chunk_layers"):
            for layer in getattr(settings, key):
                if not 0 < layer < config.sizes.vlm.depth:
                    raise ConfigError(
                        f"helpers.{key}: {layer} is not from 1 to {config.sizes.vlm.depth - 1}"
                    )
        if "named_position" in losses:
            self.name = nn.ModuleList(NameHead(width) for _ in settings.position_layers)
        if "chunk" in losses:
            if config.action_dim != config.state_dim:
                raise ConfigError(
                    f"the loss chunk reads an action at each state token: {config.action_dim} "
                    f"actions do not fit {config.state_dim} states"
                )
            self.chunk = nn.ModuleList(
                ChunkHead(width, self.joints, config.horizon) for _ in settings.chunk_layers
            )

    def scene_loss(self, network: Pi0, batch: Batch, seen: Seen | None) -> Tensor:
        """Distance of all objects' positions, for batches whose pictures have that camera."""
        if seen is not None and seen.features is not None and bool(batch.image_masks.all()):
            cameras = batch.images.shape[1]
            tokens = seen.features.unflatten(0, (-1, cameras))[:, self._camera]
        else:
            tokens = network.vision(batch.images[:, self._camera])
        return _known_mean(self.scene(tokens, network.embedder(self.name_ids)), batch.positions)

    def pixel_loss(self, network: Pi0, batch: Batch, seen: Seen) -> Tensor:
        """Place of every object in every camera's picture."""
        assert seen.features is not None
        return self.pixels.loss(
            seen.features, network.embedder(self.name_ids), batch.pixels.flatten(0, 1)
        )

    def name_loss(self, batch: Batch, seen: Seen) -> Tensor:
        """Distance of the named object's position, where an instruction names one."""
        tasks = len(batch.tokens) // len(batch.images)
        rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
        positions = batch.positions.repeat_interleave(tasks, dim=0)
        wanted = positions[rows, batch.named.clamp(min=0)]
        wanted = torch.where(batch.named[:, None] >= 0, wanted, torch.nan)
        losses = []
        for head, layer in zip(self.name, self.settings.position_layers, strict=True):
            hidden = seen.hidden[layer]
            at = batch.name_tokens + _text_start(batch, hidden)
            losses.append(_known_mean(head(hidden[rows, at]), wanted))
        return torch.stack(losses).sum()

    def chunk_loss(self, batch: Batch, seen: Seen) -> Tensor:
        """Distance of the whole chunk, read at the state's tokens."""
        wanted = batch.actions[:, :, : self.joints]
        losses = []
        for head, layer in zip(self.chunk, self.settings.chunk_layers, strict=True):
            hidden = seen.hidden[layer]
            at = batch.state_tokens + _text_start(batch, hidden)
            read = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1]))
            losses.append(F.smooth_l1_loss(head(read), wanted, beta=_CHUNK_BETA))
        return torch.stack(losses).sum()


def _text_start(batch: Batch, hidden: Tensor) -> int:
    """Where the prompt begins in the packed prefix: padding columns at its end are left out."""
    return hidden.shape[1] - int(batch.token_masks.any(0).sum())


def _known_mean(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 over the entries that are known; 0, with a gradient of 0, where none is."""
    known = wanted.isfinite()
    error = F.smooth_l1_loss(
        predicted, torch.where(known, wanted, 0.0), beta=_POSITION_BETA, reduction="none"
    )
    return (error * known).sum() / known.sum().clamp(min=1)


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
