"""The small policy's plug-in: auxiliary losses on intermediate features, and its fresh network.

A policy from scratch has to find out from the actions alone which of three cubes is meant and where
it is. These losses supervise both: the position of the named cube at the word that names it, each
joint's chunk at the token of its state, and the position of all cubes from the images.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import ConfigError, TrainConfig, parse_dataclass
from pi05_lab.training.data import Batch, Frame
from pi05_lab.training.losses import PrefixFeatures
from pi05_lab.training.plugins import AuxiliaryLosses
from pi05_lab.training.processing import DataProcessor
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.model import Pi0
from small_policy.initial import answer, make_network
from small_policy.objects import pick_rows, read_pixels, read_positions
from small_policy.words import PromptLayout

LOSSES = ("chunk", "named_position", "scene", "pixels")
_POSITION_BETA = 0.1
_CHUNK_BETA = 0.2
"""Where the smooth L1 losses turn from square to linear, in standardised or normalised units."""

__all__ = ["LOSSES", "make_losses", "make_network"]


@dataclass(frozen=True)
class AuxLossConfig:
    """The YAML file's `plugin_options`.

    `named_position` and `scene` need the dataset feature `positions`, `pixels` needs the feature
    `pixels`, `chunk` needs none.
    """

    positions: str = "scene.cube_positions"
    """Feature with x, y, z of every object, in m."""
    pixels: str = "scene.cube_pixels"
    """Feature with column and row of every object in every camera, from 0 to 1 over the image;
    below 0 where it is not visible. Cameras in the dataset's order."""
    names: tuple[str, ...] = ("red", "green", "blue")
    """The word that names each object in an instruction, in the feature's order."""
    position_layers: tuple[int, ...] = (2, 4)
    """The language model's layers whose input `named_position` reads."""
    chunk_layers: tuple[int, ...] = (3, 4)
    scene_camera: str = "cam_high"
    """The camera whose tokens `scene` reads the positions from."""


def make_losses(
    config: TrainConfig,
    processor: DataProcessor,
    datasets: Sequence[LeRobotDataset],
    losses: Collection[str],
) -> SmallPolicyLosses:
    """The losses of a training.

    Raises:
        ConfigError: options, data, tokenizer or network that do not fit.
    """
    options = parse_dataclass(AuxLossConfig, config.plugin_options, "plugin_options")
    if processor.config.kind != "pi05":
        raise ConfigError(f"the losses {', '.join(LOSSES)} read the prompt of π0.5 only")
    layout = PromptLayout(processor.tokenizer, processor.robot.state_dim, options.names)
    heads = SmallPolicyLosses(processor.config, options, losses, layout.name_ids)
    heads.layout = layout
    heads.positions = read_positions(datasets, options)
    if "pixels" in losses:
        heads.pixels_of = [read_pixels(dataset, options, processor) for dataset in datasets]
    needs = (({"scene", "named_position"}, options.positions, heads.positions),
             ({"pixels"}, options.pixels, heads.pixels_of))  # fmt: skip
    for names, feature, values in needs:
        if names & set(losses) and all(each is None for each in values):
            raise ConfigError(
                f"the losses {', '.join(sorted(names))} need the feature {feature!r}, which no "
                "dataset has: leave them out, or record it"
            )
    return heads


class SceneHead(nn.Module):
    """Positions of all objects from one camera's tokens, by attention from the objects' names.

    The query of a name is a fixed permutation of its embedding (`initial.answer`). The vision
    encoder learns to put the permuted embedding of "red" where the red cube is, and the language
    model's initial queries (`initial.initialize`) find it there.
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
    """The patch of a camera's image that each object is in, and the place in the patch.

    With the same queries as `SceneHead`: the logits are over patches and "not visible".
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(width**-0.5))
        self.absent = nn.Parameter(torch.zeros(()))
        self.within = nn.Linear(width, 2)

    def loss(self, tokens: Tensor, names: Tensor, pixels: Tensor) -> Tensor:
        """Mean over the objects whose place or absence is known.

        Args:
            tokens: [N, side · side, width] of one image each.
            names: [objects, width], embedded.
            pixels: [N, objects, 2] column and row, 0 to 1; below 0: not visible, NaN: unknown.
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
    """Chunk of joint j, from the hidden state at the token of its state."""

    def __init__(self, width: int, joints: int, horizon: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(joints, width, horizon) * 0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, joints, width] → [B, horizon, joints]."""
        return torch.einsum("bjw,jwh->bhj", _rms(hidden), self.weight).float()


class NameHead(nn.Module):
    """Position of the named object, from the hidden state at the word that names it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width] → [B, 3]."""
        result: Tensor = self.out(_rms(hidden)).float()
        return result


class SmallPolicyLosses(AuxiliaryLosses):
    """The heads and their losses."""

    prefix_losses = frozenset(("chunk", "named_position"))

    def __init__(
        self,
        config: PolicyConfig,
        options: AuxLossConfig,
        losses: Collection[str],
        name_ids: Sequence[int],
    ) -> None:
        """Make the heads that `losses` need; `name_ids` are the tokens that name the objects.

        Raises:
            ConfigError: a layer or camera that the network does not have, or different numbers of
                states and actions.
        """
        super().__init__()
        self.options = options
        # `make_losses` sets what `targets` needs.
        self.layout: PromptLayout | None = None
        self.positions: list[NDArray[np.float32] | None] = []
        self.pixels_of: list[NDArray[np.float32] | None] = []
        self.joints = config.action_dim or 0
        width, depth = config.sizes.vlm.width, config.sizes.vlm.depth
        self.register_buffer("name_ids", torch.tensor(name_ids), persistent=False)
        if "pixels" in losses:
            self.pixels = PixelHead(width)
        if "scene" in losses:
            if options.scene_camera not in config.cameras:
                raise ConfigError(
                    f"plugin_options.scene_camera {options.scene_camera!r} is not one of the "
                    f"network's cameras: {', '.join(config.cameras)}"
                )
            self._camera = config.cameras.index(options.scene_camera)
            self.scene = SceneHead(width)
        for key in ("position_layers", "chunk_layers"):
            for layer in getattr(options, key):
                if not 0 < layer < depth:
                    raise ConfigError(f"plugin_options.{key}: {layer} is not from 1 to {depth - 1}")
        if "named_position" in losses:
            self.name = nn.ModuleList(NameHead(width) for _ in options.position_layers)
        if "chunk" in losses:
            if config.action_dim != config.state_dim:
                raise ConfigError(
                    f"the loss chunk reads an action at each state token: {config.action_dim} "
                    f"actions do not fit {config.state_dim} states"
                )
            self.chunk = nn.ModuleList(
                ChunkHead(width, self.joints, config.horizon) for _ in options.chunk_layers
            )

    def targets(
        self, images: Sequence[Frame], tokens: Tensor, token_masks: Tensor
    ) -> dict[str, Tensor]:
        """Positions and pixels of the objects; where their names and the state are in the prompt.

        `positions` [P, objects, 3] centred and scaled, `pixels` [P, n_cameras, objects, 2] in the
        network's image, both NaN where unknown; `named` [P · J] the object that the instruction
        names, or -1; `name_tokens` [P · J] and `state_tokens` [P · J, state_dim] indices.
        """
        assert self.layout is not None
        named = [self.layout.named_object(row) for row in tokens.numpy()]
        states = [self.layout.state_tokens(mask) for mask in token_masks.numpy()]
        return {
            "positions": pick_rows(self.positions, images, (0, 3)),
            "pixels": pick_rows(self.pixels_of, images, (0, 0, 2)),
            "named": torch.tensor([index for index, _ in named]),
            "name_tokens": torch.tensor([token for _, token in named]),
            "state_tokens": torch.tensor(np.stack(states)),
        }

    def forward(
        self, network: Pi0, batch: Batch, names: Collection[str], features: PrefixFeatures | None
    ) -> dict[str, Tensor]:
        """Loss by name."""
        values = {}
        if features is not None and "chunk" in names:
            values["chunk"] = self.chunk_loss(batch, features)
        if features is not None and "named_position" in names:
            values["named_position"] = self.name_loss(batch, features)
        vision = None if features is None else features.vision
        if "pixels" in names:
            if vision is None:
                vision = network.vision(batch.images.flatten(0, 1))
            words, pixels = network.embedder(self.name_ids), batch.targets["pixels"]
            values["pixels"] = self.pixels.loss(vision, words, pixels.flatten(0, 1))
        if "scene" in names:
            # Without a camera, the features are of the others alone.
            if vision is not None and bool(batch.image_masks.all()):
                tokens = vision.unflatten(0, batch.image_masks.shape)[:, self._camera]
            else:
                tokens = network.vision(batch.images[:, self._camera])
            positions = self.scene(tokens, network.embedder(self.name_ids))
            values["scene"] = _known_mean(positions, batch.targets["positions"])
        return values

    def name_loss(self, batch: Batch, features: PrefixFeatures) -> Tensor:
        """Error of the named object's position, where an instruction names one."""
        named, name_tokens = batch.targets["named"], batch.targets["name_tokens"]
        tasks = len(batch.tokens) // len(batch.images)
        rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
        positions = batch.targets["positions"].repeat_interleave(tasks, dim=0)
        wanted = positions[rows, named.clamp(min=0)]
        wanted = torch.where(named[:, None] >= 0, wanted, torch.nan)
        losses = []
        for head, layer in zip(self.name, self.options.position_layers, strict=True):
            hidden = features.hidden[layer]
            at = name_tokens + _text_start(batch, hidden)
            losses.append(_known_mean(head(hidden[rows, at]), wanted))
        return torch.stack(losses).sum()

    def chunk_loss(self, batch: Batch, features: PrefixFeatures) -> Tensor:
        """Error of the chunk, read at the state's tokens."""
        wanted = batch.actions[:, :, : self.joints]
        losses = []
        for head, layer in zip(self.chunk, self.options.chunk_layers, strict=True):
            hidden = features.hidden[layer]
            at = batch.targets["state_tokens"] + _text_start(batch, hidden)
            read = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1]))
            losses.append(F.smooth_l1_loss(head(read), wanted, beta=_CHUNK_BETA))
        return torch.stack(losses).sum()


def _text_start(batch: Batch, hidden: Tensor) -> int:
    """Index of the prompt in the packed prefix, whose common padding is left out."""
    return hidden.shape[1] - int(batch.token_masks.any(0).sum())


def _known_mean(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 over the known entries; 0, with a gradient of 0, if there are none."""
    known = wanted.isfinite()
    error = F.smooth_l1_loss(
        predicted, torch.where(known, wanted, 0.0), beta=_POSITION_BETA, reduction="none"
    )
    return (error * known).sum() / known.sum().clamp(min=1)


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
