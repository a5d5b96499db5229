"""Batches for every step of a training, the same ones for the same seed, prepared ahead.

A batch depends on the seed, the stage and the step alone, so that a resumed training needs no
state of a random generator to go on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi05_lab.data.lerobot_dataset import LeRobotDataset, Sample
from pi05_lab.data.simulated import PICTURE_KEY
from pi05_lab.training.config import ConfigError, StageConfig, TrainConfig
from pi05_lab.training.objects import read_pixels, read_positions
from pi05_lab.training.preparation import DataProcessor
from pi05_lab.training.words import PromptLayout

VALIDATION = 1 << 20
"""Stands where a stage's number stands, in the seed of the validation's batches."""


@dataclass
class Batch:
    """One step's data. P pictures, J instructions each, K pairs of noise and time for each."""

    images: Tensor
    """[P, n_cameras, 3, side, side] in [-1, 1]."""
    image_masks: Tensor
    """[P, n_cameras] bool."""
    tokens: Tensor
    """[P · J, L] int64."""
    token_masks: Tensor
    """[P · J, L] bool."""
    actions: Tensor
    """[P · J, H, max_action_dim] normalised, padded with zeros."""
    states: Tensor
    """[P · J, max_state_dim] normalised, padded with zeros: π0's input."""
    noise: Tensor
    """[P · J · K, H, max_action_dim]."""
    times: Tensor
    """[P · J · K]."""
    positions: Tensor
    """[P, objects, 3] centred and scaled; NaN where a dataset does not have them."""
    pixels: Tensor
    """[P, n_cameras, objects, 2] column and row in the network's square picture, from 0 to 1;
    below 0 where the camera does not see it, NaN where a dataset does not say."""
    named: Tensor
    """[P · J] the object that the instruction names, or -1."""
    name_tokens: Tensor
    """[P · J] index of the token that names it; 0 where nothing is named."""
    state_tokens: Tensor
    """[P · J, state_dim] indices of the state's tokens; empty where the prompt has none."""

    def to(self, device: torch.device) -> Batch:
        moved = (getattr(self, f.name).to(device, non_blocking=True) for f in fields(self))
        return Batch(*moved)


@dataclass(frozen=True)
class _Group:
    """Frames of one dataset that show the same pictures, each with an instruction of its own."""

    dataset: int
    frames: tuple[int, ...]


class Examples:
    """The frames of several datasets, grouped by picture."""

    def __init__(
        self,
        datasets: Sequence[LeRobotDataset],
        config: TrainConfig,
        preparation: DataProcessor,
        layout: PromptLayout | None,
    ) -> None:
        self.datasets = list(datasets)
        self.preparation = preparation
        self.layout = layout
        self.train: list[_Group] = []
        self.held_out: list[_Group] = []
        weights: list[NDArray[np.float64]] = []
        for index, (dataset, settings) in enumerate(
            zip(self.datasets, config.data.datasets, strict=True)
        ):
            split = dataset.split(config.data.held_out, config.seed)
            groups = group_frames(dataset, dataset.frames_of(split.train))
            self.train += [_Group(index, frames) for frames in groups]
            weights.append(np.full(len(groups), settings.weight))
            self.held_out += [
                _Group(index, frames)
                for frames in group_frames(dataset, dataset.frames_of(split.held_out))
            ]
        joined = np.concatenate(weights)
        if not len(joined) or not (joined >= 0).all() or joined.sum() <= 0:
            raise ConfigError("data.datasets: there is nothing to draw: weights must be above 0")
        self._cumulative = np.cumsum(joined / joined.sum())
        self._task_weights = config.data.task_weights
        self._positions = read_positions(self.datasets, config)
        self._pixels = [read_pixels(d, config, preparation) for d in self.datasets]

    @property
    def frames(self) -> int:
        """Frames to train on, counting a picture once for each of its instructions."""
        return sum(len(group.frames) for group in self.train)

    @property
    def objects(self) -> int:
        """Objects whose positions are known; 0 where no dataset has them."""
        return next((p.shape[1] for p in self._positions if p is not None), 0)

    @property
    def has_pixels(self) -> bool:
        """Whether some dataset says where its cameras see the objects."""
        return any(pixels is not None for pixels in self._pixels)

    def batch(self, stage: StageConfig, seed: Sequence[int]) -> Batch:
        """The training batch that belongs to a seed."""
        rng = np.random.default_rng(list(seed))
        drawn = np.searchsorted(self._cumulative, rng.random(stage.batch), side="right")
        groups = [self.train[min(int(i), len(self.train) - 1)] for i in drawn]
        return self._assemble(groups, stage.tasks_per_picture, stage.samples_per_prefix, rng)

    def validation(
        self, frames: int, batch: int, seed: int, other_text: bool = False
    ) -> Iterator[Batch]:
        """Batches of held-out frames, always the same ones.

        With `other_text` each has the instruction of the next one in its batch.
        """
        order = np.random.default_rng([seed, VALIDATION]).permutation(len(self.held_out))[:frames]
        for start in range(0, len(order), batch):
            rng = np.random.default_rng([seed, VALIDATION, start])
            groups = [self.held_out[int(i)] for i in order[start : start + batch]]
            yield self._assemble(groups, 1, 1, rng, other_text)

    def _assemble(
        self,
        groups: list[_Group],
        tasks: int,
        repeats: int,
        rng: np.random.Generator,
        other_text: bool = False,
    ) -> Batch:
        preparation, config = self.preparation, self.preparation.config
        pictures = [
            preparation.images(self._sample(group.dataset, group.frames[0])) for group in groups
        ]
        rows = [
            (group.dataset, frame)
            for group in groups
            for frame in self._draw_frames(group, tasks, rng)
        ]
        count = len(rows)
        texts = [self.datasets[dataset].task(frame) for dataset, frame in rows]
        if other_text:
            texts = texts[1:] + texts[:1]
        actions = np.zeros((count, config.horizon, config.max_action_dim), dtype=np.float32)
        states = np.zeros((count, config.max_state_dim), dtype=np.float32)
        ids = np.zeros((count, config.token_length), dtype=np.int64)
        masks = np.zeros((count, config.token_length), dtype=bool)
        for row, (dataset, frame) in enumerate(rows):
            source = self.datasets[dataset]
            chunk = source.actions(frame, config.horizon)[0]
            state, action, tokens = preparation.numbers(source.state[frame], chunk, texts[row])
            actions[row, :, : action.shape[1]] = action
            states[row, : len(state)] = state
            ids[row], masks[row] = tokens.ids, tokens.mask
        named, name_tokens, state_tokens = self._find_words(ids, masks)
        shape = (count * repeats, config.horizon, config.max_action_dim)
        times = rng.beta(config.time_alpha, config.time_beta, count * repeats)
        return Batch(
            images=torch.stack([images for images, _ in pictures]),
            image_masks=torch.stack([mask for _, mask in pictures]),
            tokens=torch.from_numpy(ids),
            token_masks=torch.from_numpy(masks),
            actions=torch.from_numpy(actions),
            states=torch.from_numpy(states),
            noise=torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            times=torch.from_numpy(
                (times * config.time_scale + config.time_offset).astype(np.float32)
            ),
            positions=torch.from_numpy(self._positions_of(groups)),
            pixels=torch.from_numpy(self._pixels_of(groups)),
            named=torch.from_numpy(named),
            name_tokens=torch.from_numpy(name_tokens),
            state_tokens=torch.from_numpy(state_tokens),
        )

    def _sample(self, dataset: int, frame: int) -> Sample:
        return self.datasets[dataset].sample(
            frame, self.preparation.config.horizon, tuple(self.preparation.cameras)
        )

    def _draw_frames(
        self, group: _Group, tasks: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        frames = np.array(group.frames)
        if len(frames) == 1:
            return frames.repeat(tasks)
        weights = np.ones(len(frames))
        if self._task_weights:
            source = self.datasets[group.dataset]
            for index, frame in enumerate(frames):
                words = source.task(int(frame)).split()
                weights[index] = max(
                    (w for word, w in self._task_weights.items() if word in words), default=1.0
                )
        chosen = rng.choice(
            len(frames), tasks, replace=tasks > len(frames), p=weights / weights.sum()
        )
        return frames[chosen]

    def _find_words(
        self, ids: NDArray[np.int64], masks: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        count = len(ids)
        if self.layout is None:
            return np.full(count, -1), np.zeros(count, np.int64), np.zeros((count, 0), np.int64)
        found = [self.layout.named_object(row) for row in ids]
        states = np.stack([self.layout.state_tokens(mask) for mask in masks])
        return np.array([n for n, _ in found]), np.array([t for _, t in found]), states

    def _positions_of(self, groups: Sequence[_Group]) -> NDArray[np.float32]:
        values = np.full((len(groups), self.objects, 3), np.nan, dtype=np.float32)
        for row, group in enumerate(groups):
            known = self._positions[group.dataset]
            if known is not None:
                values[row] = known[group.frames[0]]
        return values

    def _pixels_of(self, groups: Sequence[_Group]) -> NDArray[np.float32]:
        known = [self._pixels[group.dataset] for group in groups]
        shape = next((pixels.shape[1:] for pixels in self._pixels if pixels is not None), (0, 0, 2))
        values = np.full((len(groups), *shape), np.nan, dtype=np.float32)
        for row, (group, pixels) in enumerate(zip(groups, known, strict=True)):
            if pixels is not None:
                values[row] = pixels[group.frames[0]]
        return values


def group_frames(dataset: LeRobotDataset, frames: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """The frames that show the same pictures under different instructions, together.

    Only data labelled by an expert has those, and says so by its feature `picture_index`. Elsewhere
    every frame stands alone.
    """
    if PICTURE_KEY not in dataset.extras or len(frames) == 0:
        return [(int(frame),) for frame in frames]
    pictures = dataset.extra(PICTURE_KEY)[frames]
    order = np.argsort(pictures, kind="stable")
    pieces = np.split(frames[order], np.flatnonzero(np.diff(pictures[order])) + 1)
    return [tuple(int(frame) for frame in piece) for piece in pieces]


def describe(examples: Examples) -> Mapping[str, int]:
    """Counts for the log and the model card."""
    return {
        "pictures": len(examples.train),
        "frames": examples.frames,
        "held_out_pictures": len(examples.held_out),
    }
