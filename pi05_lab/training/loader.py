"""A stage's batches, prepared ahead of the step that learns from them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from pi05_lab.training.batches import Batch, Examples
from pi05_lab.training.config import StageConfig

AHEAD = 4
"""Batches prepared while one is learnt from."""


class _Steps(Dataset[Batch]):
    """The batches of a stage as PyTorch's loader wants them: by step."""

    def __init__(self, examples: Examples, stage: StageConfig, seed: Sequence[int]) -> None:
        self._examples, self._stage, self._seed = examples, stage, tuple(seed)

    def __getitem__(self, step: int) -> Batch:
        return self._examples.batch(self._stage, (*self._seed, step))


class Loader:
    """A stage's batches from a step on, prepared in a thread or in processes.

    Close it, or use it in a `with` statement.
    """

    def __init__(
        self, examples: Examples, stage: StageConfig, seed: Sequence[int], first: int, workers: int
    ) -> None:
        self._steps = _Steps(examples, stage, seed)
        self._first = first
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        if workers:
            loader = DataLoader(
                self._steps,
                batch_size=None,
                sampler=_Count(first),
                num_workers=workers,
                prefetch_factor=AHEAD,
            )
            self._iterator: Iterator[Any] | None = iter(loader)
        else:
            self._iterator = None
            self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
            self._thread.start()

    def next(self) -> Batch:
        """The next step's batch.

        Raises:
            Whatever preparing it raised.
        """
        if self._iterator is not None:
            batch: Batch = next(self._iterator)
            return batch
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _fill(self) -> None:
        step = self._first
        while not self._closed.is_set():
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
            if isinstance(item, BaseException):
                return
            step += 1

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._iterator = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Count:
    """first, first + 1, … without an end."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        step = self._first
        while True:
            yield step
            step += 1
