"""Data sets, sampling and batches, prepared ahead of the step that needs them.

A batch is a function of seed, stage, process and step, so a resumed training needs no state of a
random generator to continue as if it had not stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import PICTURE_KEY
from pi05_lab.training.config import ConfigError, StageConfig, TrainConfig
from pi05_lab.training.plugins import AuxiliaryLosses
from pi05_lab.training.processing import DataProcessor

VALIDATION = 1 << 20
"""In place of the stage's number, in the seed of the validation's batches."""
AHEAD = 4
"""Batches prepared in advance."""


@dataclass
class Batch:
    """One step's data: P images (of all cameras), J instructions each, K noise and times each."""

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
    targets: dict[str, Tensor]
    """What a plug-in's losses need."""

    def to(self, device: torch.device) -> Batch:
        """A copy on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            return value.to(device, non_blocking=True)

        return Batch(**move(vars(self)))


class Frame(NamedTuple):
    """One frame of one of the datasets."""

    dataset: int
    number: int


Group = tuple[Frame, ...]
"""Frames of one dataset that show the same images, each with its own instruction."""


class Examples:
    """The frames of several datasets, grouped by images."""

    def __init__(
        self,
        datasets: Sequence[LeRobotDataset],
        config: TrainConfig,
        processor: DataProcessor,
        auxiliary: AuxiliaryLosses | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.processor = processor
        self.auxiliary = auxiliary
        self.train: list[Group] = []
        self.held_out: list[Group] = []
        for number, dataset in enumerate(self.datasets):
            split = dataset.split(config.data.held_out, config.seed)
            for groups, episodes in ((self.train, split.train), (self.held_out, split.held_out)):
                for group in group_frames(dataset, dataset.frames_of(episodes)):
                    groups.append(tuple(Frame(number, frame) for frame in group))
        weights = np.array([config.data.datasets[group[0].dataset].weight for group in self.train])
        if not (weights >= 0).all() or weights.sum() <= 0:
            raise ConfigError("data.datasets: nothing to sample: weights must be above 0")
        self._cumulative = np.cumsum(weights / weights.sum())
        self._task_weights = config.data.task_weights

    def counts(self) -> dict[str, int]:
        """Sizes for the log and the model card."""
        return {
            "images": len(self.train),
            "frames": sum(map(len, self.train)),
            "held_out_images": len(self.held_out),
        }

    def batch(self, stage: StageConfig, seed: Sequence[int]) -> Batch:
        """The training batch of a seed."""
        rng = np.random.default_rng(list(seed))
        drawn = np.searchsorted(self._cumulative, rng.random(stage.batch), side="right")
        groups = [self.train[min(int(i), len(self.train) - 1)] for i in drawn]
        return self._assemble(groups, stage.tasks_per_picture, stage.samples_per_prefix, rng)

    def validation(
        self, frames: int, batch: int, seed: int, other_text: bool = False
    ) -> Iterator[Batch]:
        """Batches of held-out frames, the same for the same seed.

        With `other_text` each row has the instruction of the next one in its batch.
        """
        order = np.random.default_rng([seed, VALIDATION]).permutation(len(self.held_out))[:frames]
        for start in range(0, len(order), batch):
            rng = np.random.default_rng([seed, VALIDATION, start])
            groups = [self.held_out[int(i)] for i in order[start : start + batch]]
            yield self._assemble(groups, 1, 1, rng, other_text)

    def _assemble(
        self,
        groups: list[Group],
        tasks: int,
        repeats: int,
        rng: np.random.Generator,
        other_text: bool = False,
    ) -> Batch:
        processor, config = self.processor, self.processor.config
        shown = [group[0] for group in groups]
        cameras = tuple(processor.cameras)
        images, image_masks = zip(
            *(processor.images(self.datasets[d].images(frame, cameras)) for d, frame in shown),
            strict=True,
        )
        rows = [frame for group in groups for frame in self._draw_frames(group, tasks, rng)]
        size = len(rows)
        texts = [self.datasets[dataset].task(frame) for dataset, frame in rows]
        if other_text:
            texts = texts[1:] + texts[:1]
        actions = np.zeros((size, config.horizon, config.max_action_dim), dtype=np.float32)
        states = np.zeros((size, config.max_state_dim), dtype=np.float32)
        prompts = []
        for row, (dataset, frame) in enumerate(rows):
            source = self.datasets[dataset]
            chunk = source.actions(frame, config.horizon)[0]
            state, action, prompt = processor.numbers(source.state[frame], chunk, texts[row])
            actions[row, :, : action.shape[1]] = action
            states[row, : len(state)] = state
            prompts.append(prompt)
        tokens = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]))
        token_masks = torch.from_numpy(np.stack([prompt.mask for prompt in prompts]))
        targets: dict[str, Tensor] = {}
        if self.auxiliary is not None:
            targets = self.auxiliary.targets(shown, tokens, token_masks)
        times = rng.beta(config.time_alpha, config.time_beta, size * repeats)
        times = (times * config.time_scale + config.time_offset).astype(np.float32)
        shape = (size * repeats, config.horizon, config.max_action_dim)
        return Batch(
            images=torch.stack(images),
            image_masks=torch.stack(image_masks),
            tokens=tokens,
            token_masks=token_masks,
            actions=torch.from_numpy(actions),
            states=torch.from_numpy(states),
            noise=torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            times=torch.from_numpy(times),
            targets=targets,
        )

    def _draw_frames(self, group: Group, tasks: int, rng: np.random.Generator) -> list[Frame]:
        count = len(group)
        if count == 1:
            return [group[0]] * tasks
        weights = np.ones(count)
        if self._task_weights:
            for index, (dataset, frame) in enumerate(group):
                words = self.datasets[dataset].task(frame).split()
                found = (w for word, w in self._task_weights.items() if word in words)
                weights[index] = max(found, default=1.0)
        weights /= weights.sum()
        return [group[i] for i in rng.choice(count, tasks, replace=tasks > count, p=weights)]


def group_frames(dataset: LeRobotDataset, frames: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """Groups of frames with the same images and different instructions.

    Data labelled by an expert has them, with the feature `picture_index`; otherwise a group is one
    frame.
    """
    if PICTURE_KEY not in dataset.extras or len(frames) == 0:
        return [(frame,) for frame in frames.tolist()]
    images = dataset.extra(PICTURE_KEY)[frames]
    order = np.argsort(images, kind="stable")
    pieces = np.split(frames[order], np.flatnonzero(np.diff(images[order])) + 1)
    return [tuple(piece.tolist()) for piece in pieces]


class _Steps(Dataset[Batch]):
    """The batches of a stage by step; worker processes receive a copy."""

    def __init__(self, examples: Examples, stage: StageConfig, seed: Sequence[int]) -> None:
        self._examples, self._stage, self._seed = examples, stage, tuple(seed)

    def __getitem__(self, step: int) -> Batch:
        return self._examples.batch(self._stage, (*self._seed, step))


@contextmanager
def load_batches(
    examples: Examples, stage: StageConfig, seed: Sequence[int], first: int, workers: int
) -> Iterator[Iterator[Batch]]:
    """The batches of a stage from step `first` on, prepared in a thread or in processes.

    `next` raises what the preparation of that batch raised.
    """
    steps = _Steps(examples, stage, seed)
    if workers:
        yield iter(
            DataLoader(
                steps,
                batch_size=None,
                sampler=count(first),
                num_workers=workers,
                prefetch_factor=AHEAD,
            )
        )
        return
    with ThreadPoolExecutor(1, "batches") as pool:
        futures = deque(pool.submit(steps.__getitem__, first + i) for i in range(AHEAD))

        def generate() -> Iterator[Batch]:
            for step in count(first + AHEAD):
                future = futures.popleft()
                futures.append(pool.submit(steps.__getitem__, step))
                yield future.result()

        try:
            yield generate()
        finally:
            pool.shutdown(cancel_futures=True)
