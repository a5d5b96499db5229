"""Plays simulated episodes in several processes and hands them on in their order."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pi05_ros.recording.layout import DatasetError
from pi05_ros.recording.simulated import Frame, Recipe, SimulatedRecorder

_AHEAD = 3
"""Episodes per worker that may wait for an earlier one: bounds the memory."""

_recipe: Recipe | None = None
_recorder: SimulatedRecorder | None = None


def episodes(recipe: Recipe, count: int, workers: int = 1) -> Iterator[list[Frame]]:
    """Episodes 0 … count − 1, the same ones whatever the number of workers.

    Args:
        recipe: what is played.
        count: number of episodes.
        workers: processes, each with a simulator and a renderer; 1 for none but this one.

    Raises:
        DatasetError: the expert keeps failing, or a worker died.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        recorder = SimulatedRecorder(recipe)
        try:
            for number in range(count):
                yield recorder.episode(number)
        finally:
            recorder.close()
        return
    # OpenGL and its threads do not outlive a fork
    pool = ProcessPoolExecutor(
        min(workers, count), multiprocessing.get_context("spawn"), _start, (recipe,)
    )
    try:
        waiting: deque[Future[list[Frame]]] = deque()
        for number in range(count):
            waiting.append(pool.submit(_play, number))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DatasetError(
            "a recording process was killed, by the lack of memory perhaps: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(recipe: Recipe) -> None:
    global _recipe
    _recipe = recipe
    # Ctrl-C reaches the whole process group; the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _play(number: int) -> list[Frame]:
    global _recorder
    assert _recipe is not None
    if _recorder is None:
        # here and not in `_start`, so that its errors reach the parent
        _recorder = SimulatedRecorder(_recipe)
    return _recorder.episode(number)
