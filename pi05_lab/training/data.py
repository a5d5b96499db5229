"""Data sets, sampling and batches, prepared ahead of the step that needs them.

A batch is a function of seed, stage, process and step, so a resumed training needs no state of a
random generator to continue as if it had not stopped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pi05_lab.data.lerobot_dataset import LeRobotDataset, Sample
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
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors()}
        targets = {name: v.to(device, non_blocking=True) for name, v in self.targets.items()}
        return Batch(**moved, targets=targets)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Name and value of all fields but `targets`."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "targets"]


class Frame(NamedTuple):
    """One frame of one of the datasets."""

    dataset: int
    number: int


@dataclass(frozen=True)
class Group:
    """Frames of one dataset that show the same images, each with its own instruction."""

    dataset: int
    frames: tuple[int, ...]

    @property
    def first(self) -> Frame:
        return Frame(self.dataset, self.frames[0])


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
        weights: list[NDArray[np.float64]] = []
        for number, (dataset, settings) in enumerate(
            zip(self.datasets, config.data.datasets, strict=True)
        ):
            split = dataset.split(config.data.held_out, config.seed)
            train, held_out = (
                [Group(number, frames) for frames in group_frames(dataset, chosen)]
                for chosen in (dataset.frames_of(split.train), dataset.frames_of(split.held_out))
            )
            self.train += train
            self.held_out += held_out
            weights.append(np.full(len(train), settings.weight))
        joined = np.concatenate(weights)
        if not len(joined) or not (joined >= 0).all() or joined.sum() <= 0:
            raise ConfigError("data.datasets: nothing to sample: weights must be above 0")
        self._cumulative = np.cumsum(joined / joined.sum())
        self._task_weights = config.data.task_weights

    def counts(self) -> dict[str, int]:
        """Sizes for the log and the model card."""
        return {
            "images": len(self.train),
            "frames": sum(len(group.frames) for group in self.train),
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
        images, image_masks = zip(
            *(processor.images(self._sample(group.first)) for group in groups), strict=True
        )
        rows = [
            (group.dataset, frame)
            for group in groups
            for frame in self._draw_frames(group, tasks, rng)
        ]
        size = len(rows)
        texts = [self.datasets[dataset].task(frame) for dataset, frame in rows]
        if other_text:
            texts = texts[1:] + texts[:1]
        actions = np.zeros((size, config.horizon, config.max_action_dim), dtype=np.float32)
        states = np.zeros((size, config.max_state_dim), dtype=np.float32)
        ids = np.zeros((size, config.token_length), dtype=np.int64)
        masks = np.zeros((size, config.token_length), dtype=bool)
        for row, (dataset, frame) in enumerate(rows):
            source = self.datasets[dataset]
            chunk = source.actions(frame, config.horizon)[0]
            state, action, prompt = processor.numbers(source.state[frame], chunk, texts[row])
            actions[row, :, : action.shape[1]] = action
            states[row, : len(state)] = state
            ids[row], masks[row] = prompt.ids, prompt.mask
        tokens, token_masks = torch.from_numpy(ids), torch.from_numpy(masks)
        targets: dict[str, Tensor] = {}
        if self.auxiliary is not None:
            targets = self.auxiliary.targets([g.first for g in groups], tokens, token_masks)
        shape = (size * repeats, config.horizon, config.max_action_dim)
        times = rng.beta(config.time_alpha, config.time_beta, size * repeats)
        return Batch(
            images=torch.stack(images),
            image_masks=torch.stack(image_masks),
            tokens=tokens,
            token_masks=token_masks,
            actions=torch.from_numpy(actions),
            states=torch.from_numpy(states),
            noise=torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            times=torch.from_numpy(
                (times * config.time_scale + config.time_offset).astype(np.float32)
            ),
            targets=targets,
        )

    def _sample(self, frame: Frame) -> Sample:
        return self.datasets[frame.dataset].sample(
            frame.number, self.processor.config.horizon, tuple(self.processor.cameras)
        )

    def _draw_frames(self, group: Group, tasks: int, rng: np.random.Generator) -> NDArray[np.int64]:
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


def group_frames(dataset: LeRobotDataset, frames: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """Groups of frames with the same images and different instructions.

    Data labelled by an expert has them, with the feature `picture_index`; otherwise a group is one
    frame.
    """
    if PICTURE_KEY not in dataset.extras or len(frames) == 0:
        return [(int(frame),) for frame in frames]
    images = dataset.extra(PICTURE_KEY)[frames]
    order = np.argsort(images, kind="stable")
    pieces = np.split(frames[order], np.flatnonzero(np.diff(images[order])) + 1)
    return [tuple(int(frame) for frame in piece) for piece in pieces]


class _Steps(Dataset[Batch]):
    """The batches of a stage by step, for PyTorch's loader."""

    def __init__(self, examples: Examples, stage: StageConfig, seed: Sequence[int]) -> None:
        self._examples, self._stage, self._seed = examples, stage, tuple(seed)

    def __getitem__(self, step: int) -> Batch:
        return self._examples.batch(self._stage, (*self._seed, step))


class Loader:
    """The batches of a stage from step `first` on, prepared in a thread or in processes.

    Used in a `with` statement.
    """

    def __init__(
        self, examples: Examples, stage: StageConfig, seed: Sequence[int], first: int, workers: int
    ) -> None:
        self._steps = _Steps(examples, stage, seed)
        self._first = first
        self._closed = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self._iterator: Iterator[Any] | None = None
        self._thread: threading.Thread | None = None
        if workers:
            loader = DataLoader(
                self._steps,
                batch_size=None,
                sampler=_From(first),
                num_workers=workers,
                prefetch_factor=AHEAD,
            )
            self._iterator = iter(loader)
        else:
            self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
            self._thread.start()

    def next(self) -> Batch:
        """The batch of the next step; raises what its preparation raised."""
        if self._iterator is not None:
            batch: Batch = next(self._iterator)
            return batch
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _fill(self) -> None:
        for step in count(self._first):
            item: Batch | BaseException
            try:
                item = self._steps[step]
            except Exception as error:
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException) or self._closed.is_set():
                return

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._iterator = None


class _From:
    """A sampler of all steps from one on."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return count(self._first)
