"""Data sets, sampling and batches, prepared ahead of the step that needs them.

A batch is a function of seed, stage and step. Processes and passes share its frames, so neither
their number nor a resumed training changes what is learnt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
WINDOWS = VALIDATION + 1
"""In the seed of the order of files."""
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
    delays: Tensor
    """[P · J · K] int64: the clean steps at the chunk's start."""
    targets: dict[str, Tensor]
    """What a plug-in's losses need."""
    answers: Tensor | None = None
    """[P · J, F] int64: the action tokens that the loss `fast` predicts, padded."""
    answer_masks: Tensor | None = None
    """[P · J, F] bool."""
    has_delays: bool = False
    """Whether the stage draws `delays`; known without the device."""

    def to(self, device: torch.device) -> Batch:
        """A copy on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**move(vars(self)))


class Frame(NamedTuple):
    """One frame of one of the datasets."""

    dataset: int
    number: int


@dataclass(frozen=True)
class Groups:
    """Groups of frames that show the same images, each with its own instruction.

    A group is of one dataset.
    """

    dataset: NDArray[np.int32]
    """[n] the dataset of each group."""
    frames: NDArray[np.int64]
    """[n_frames] the groups' frames, one group after the other."""
    ends: NDArray[np.int64]
    """[n] where each group ends in `frames`."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Frame, ...]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> tuple[Frame, ...]:
        begin = self.ends[number - 1] if number else 0
        dataset = int(self.dataset[number])
        return tuple(Frame(dataset, f) for f in self.frames[begin : self.ends[number]].tolist())

    @classmethod
    def of(cls, datasets: Sequence[LeRobotDataset], frames: Sequence[NDArray[np.int64]]) -> Groups:
        """The groups of each dataset's frames."""
        parts = [group_frames(d, chosen) for d, chosen in zip(datasets, frames, strict=True)]
        lengths = [np.full(len(length), number) for number, (_, length) in enumerate(parts)]
        return cls(
            np.concatenate(lengths).astype(np.int32),
            np.concatenate([ordered for ordered, _ in parts]),
            np.cumsum(np.concatenate([length for _, length in parts])),
        )


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
        splits = [d.split(config.data.held_out, config.seed) for d in self.datasets]
        self.train, self.held_out = (
            Groups.of(
                self.datasets,
                [d.frames_of(getattr(s, side)) for d, s in zip(self.datasets, splits, strict=True)],
            )
            for side in ("train", "held_out")
        )
        self._task_weights = [_task_weights(d, config.data.task_weights) for d in self.datasets]
        weights = self._group_weights(np.array([d.weight for d in config.data.datasets]))
        if not (weights >= 0).all() or weights.sum() <= 0:
            raise ConfigError("data.datasets: nothing to sample: weights must be above 0")
        self._weights = weights
        self._windows: _Windows | None = None
        if config.data.window_files:
            self._windows = _Windows(self.datasets, self.train, config)

    def _group_weights(self, of_dataset: NDArray[np.float64]) -> NDArray[np.float64]:
        """The dataset's weight times the mean weight of the group's instructions."""
        groups = self.train
        lengths = np.diff(groups.ends, prepend=0)
        owner = np.repeat(groups.dataset, lengths)
        weights = np.empty(len(groups.frames))
        for number, by_frame in enumerate(self._task_weights):
            weights[owner == number] = by_frame[groups.frames[owner == number]]
        means = np.add.reduceat(weights, groups.ends - lengths) / lengths
        return np.asarray(of_dataset[groups.dataset] * means, dtype=np.float64)

    def counts(self) -> dict[str, int]:
        """Sizes for the log and the model card."""
        return {
            "images": len(self.train),
            "frames": len(self.train.frames),
            "held_out_images": len(self.held_out),
        }

    def batch(
        self, stage: StageConfig, seed: Sequence[int], part: int = 0, parts: int = 1
    ) -> Batch:
        """One of the equal parts of a step's batch; `seed` is of the step."""
        drawn = np.random.default_rng(list(seed)).random(stage.batch)
        numbers = self._draw(drawn, seed[-1])
        size = stage.batch // parts
        rows = [
            _Row(self.train[int(numbers[i])], np.random.default_rng([*seed, i]))
            for i in range(part * size, (part + 1) * size)
        ]
        return self._assemble(rows, stage, augment=True)

    def _draw(self, drawn: NDArray[np.float64], step: int) -> NDArray[np.int64]:
        """Groups by their weights, for random numbers [n] from 0 to 1."""
        if self._windows is None:
            candidates, cumulative = None, self._cumulative
        else:
            candidates = self._windows.groups(step * len(drawn))
            cumulative = np.cumsum(self._weights[candidates])
            if cumulative[-1] <= 0:
                raise ConfigError(
                    "data.window_files: all frames of a window have the weight 0; give more files"
                )
            cumulative /= cumulative[-1]
        found = np.searchsorted(cumulative, drawn, side="right")
        found = np.minimum(found, len(cumulative) - 1)
        return found if candidates is None else candidates[found]

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        return np.cumsum(self._weights / self._weights.sum())

    def validation(
        self, frames: int, batch: int, seed: int, other_text: bool = False
    ) -> Iterator[Batch]:
        """Batches of held-out frames, the same for the same seed.

        With `other_text` each row has the instruction of the next one in its batch.
        """
        order = np.random.default_rng([seed, VALIDATION]).permutation(len(self.held_out))[:frames]
        for start in range(0, len(order), batch):
            rows = [
                _Row(self.held_out[int(number)], np.random.default_rng([seed, VALIDATION, i]))
                for i, number in enumerate(order[start : start + batch], start)
            ]
            yield self._assemble(rows, None, other_text=other_text)

    def _assemble(
        self,
        pictured: Sequence[_Row],
        stage: StageConfig | None,
        augment: bool = False,
        other_text: bool = False,
    ) -> Batch:
        """The batch of these images; without a stage, one instruction and one noise for each."""
        tasks, repeats, longest = 1, 1, 0
        if stage is not None:
            tasks, repeats = stage.tasks_per_picture, stage.samples_per_prefix
            longest = stage.rtc_max_delay
        processor, config = self.processor, self.processor.config
        cameras = tuple(processor.cameras)
        rows = [frame for row in pictured for frame in self._draw_frames(row, tasks)]
        images, image_masks = zip(
            *(
                processor.images(
                    self.datasets[row.group[0].dataset].images(row.group[0].number, cameras),
                    row.rng if augment else None,
                )
                for row in pictured
            ),
            strict=True,
        )
        texts = [self.datasets[dataset].task(frame) for dataset, frame in rows]
        if other_text:
            texts = texts[1:] + texts[:1]
        actions = np.zeros((len(rows), config.horizon, config.max_action_dim), dtype=np.float32)
        states = np.zeros((len(rows), config.max_state_dim), dtype=np.float32)
        prompts = []
        answers: list[NDArray[np.int64]] = []
        for index, (dataset, frame) in enumerate(rows):
            source = self.datasets[dataset]
            chunk = source.actions(frame, config.horizon)[0]
            state, action, prompt = processor.numbers(source.state[frame], chunk, texts[index])
            actions[index, :, : action.shape[1]] = action
            states[index, : len(state)] = state
            prompts.append(prompt)
            if processor.language is not None:
                answers.append(processor.answer(action))
        tokens = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]))
        token_masks = torch.from_numpy(np.stack([prompt.mask for prompt in prompts]))
        targets: dict[str, Tensor] = {}
        if self.auxiliary is not None:
            targets = self.auxiliary.targets([r.group[0] for r in pictured], tokens, token_masks)
        times, delays, noise = [], [], []
        count, shape = tasks * repeats, (config.horizon, config.max_action_dim)
        for row in pictured:
            drawn = row.rng.beta(config.time_alpha, config.time_beta, count)
            times.append(drawn * config.time_scale + config.time_offset)
            delays.append(row.rng.integers(0, longest + 1, count))
            noise.append(row.rng.standard_normal((count, *shape), dtype=np.float32))
        return Batch(
            images=torch.stack(images),
            image_masks=torch.stack(image_masks),
            tokens=tokens,
            token_masks=token_masks,
            actions=torch.from_numpy(actions),
            states=torch.from_numpy(states),
            noise=torch.from_numpy(np.concatenate(noise)),
            times=torch.from_numpy(np.concatenate(times).astype(np.float32)),
            delays=torch.from_numpy(np.concatenate(delays)),
            targets=targets,
            has_delays=longest > 0,
            **_padded_answers(answers),
        )

    def _draw_frames(self, row: _Row, tasks: int) -> list[Frame]:
        group, count = row.group, len(row.group)
        if count == 1:
            return [group[0]] * tasks
        weights = np.array([self._task_weights[dataset][frame] for dataset, frame in group])
        weights /= weights.sum()
        return [group[i] for i in row.rng.choice(count, tasks, replace=tasks > count, p=weights)]


class _Windows:
    """The groups of a few image files at a time; the files of a random order take turns.

    As many frames are drawn while a file is among them as a uniform draw from all would take of it.
    """

    def __init__(
        self, datasets: Sequence[LeRobotDataset], groups: Groups, config: TrainConfig
    ) -> None:
        firsts = groups.frames[groups.ends - np.diff(groups.ends, prepend=0)]
        file = np.empty(len(groups), dtype=np.int64)
        begin = 0
        for number, dataset in enumerate(datasets):
            files, mine = dataset.image_files(), groups.dataset == number
            file[mine] = files[firsts[mine]] + begin
            begin += int(files.max()) + 1
        order = np.argsort(file, kind="stable")
        pieces = np.split(order, np.flatnonzero(np.diff(file[order])) + 1)
        shuffled = np.random.default_rng([config.seed, WINDOWS]).permutation(len(pieces))
        self._files = [pieces[int(number)] for number in shuffled]
        self._size = min(config.data.window_files, len(pieces))
        self._per_file = max(1, len(groups) // len(pieces))
        self._latest: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def groups(self, drawn: int) -> NDArray[np.int64]:
        """The groups that a draw chooses from; `drawn` is the number of draws before it."""
        first = drawn // self._per_file
        if self._latest[0] != first:
            files = [self._files[(first + k) % len(self._files)] for k in range(self._size)]
            self._latest = first, np.concatenate(files)
        return self._latest[1]


class _Row(NamedTuple):
    """One of a batch's images."""

    group: tuple[Frame, ...]
    rng: np.random.Generator
    """Of everything that is drawn for it."""


def _padded_answers(answers: Sequence[NDArray[np.int64]]) -> dict[str, Tensor]:
    if not answers:
        return {}
    length = max(map(len, answers))
    ids = np.zeros((len(answers), length), dtype=np.int64)
    for row, answer in zip(ids, answers, strict=True):
        row[: len(answer)] = answer
    masks = np.arange(length) < np.array([len(answer) for answer in answers])[:, None]
    return {"answers": torch.from_numpy(ids), "answer_masks": torch.from_numpy(masks)}


def _task_weights(dataset: LeRobotDataset, of_word: Mapping[str, float]) -> NDArray[np.float64]:
    """[n_frames] the largest weight of a word of each frame's instruction; 1 without one."""
    largest = {
        index: max((w for word, w in of_word.items() if word in task.split()), default=1.0)
        for index, task in dataset.meta.tasks.items()
    }
    table = np.ones(max(largest, default=0) + 1)
    table[list(largest)] = list(largest.values())
    return np.asarray(table[np.minimum(dataset.task_index, len(table) - 1)])


def group_frames(
    dataset: LeRobotDataset, frames: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups of frames with the same images and different instructions.

    Data labelled by an expert has them, with the feature `picture_index`; otherwise a group is one
    frame.

    Returns:
        The frames, one group after the other, and the length of each group.
    """
    if PICTURE_KEY not in dataset.extras or len(frames) == 0:
        return frames, np.ones(len(frames), dtype=np.int64)
    images = dataset.extra(PICTURE_KEY)[frames]
    order = np.argsort(images, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(images[order])) + 1, len(frames))
    return frames[order], np.diff(ends, prepend=0)


class _Parts(Dataset[Batch]):
    """The parts of a stage's batches for one process; worker processes receive a copy."""

    def __init__(
        self,
        examples: Examples,
        stage: StageConfig,
        seed: Sequence[int],
        rank: int,
        processes: int,
    ) -> None:
        self._examples, self._stage, self._seed = examples, stage, tuple(seed)
        self._rank, self._parts = rank, processes * stage.accumulate

    def __getitem__(self, number: int) -> Batch:
        step, own = divmod(number, self._stage.accumulate)
        part = self._rank * self._stage.accumulate + own
        return self._examples.batch(self._stage, (*self._seed, step), part, self._parts)


@contextmanager
def load_batches(
    examples: Examples,
    stage: StageConfig,
    seed: Sequence[int],
    first: int,
    workers: int,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Iterator[Batch]]:
    """The batches of a stage from step `first` on, prepared in a thread or in processes.

    Each step has `stage.accumulate` of them. `next` raises what the preparation of that batch
    raised.
    """
    parts = _Parts(examples, stage, seed, rank, processes)
    first *= stage.accumulate
    if workers:
        yield iter(
            DataLoader(
                parts,
                batch_size=None,
                sampler=count(first),
                num_workers=workers,
                prefetch_factor=AHEAD,
            )
        )
        return
    with ThreadPoolExecutor(1, "batches") as pool:
        futures = deque(pool.submit(parts.__getitem__, first + i) for i in range(AHEAD))

        def generate() -> Iterator[Batch]:
            for number in count(first + AHEAD):
                future = futures.popleft()
                futures.append(pool.submit(parts.__getitem__, number))
                yield future.result()

        try:
            yield generate()
        finally:
            pool.shutdown(cancel_futures=True)
