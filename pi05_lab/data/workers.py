"""Plays simulated episodes in several processes and hands them on in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pi05_lab.data.lerobot_format import DatasetError
from pi05_lab.data.simulated import Actor, Frame, RecordConfig, SimulatedRecorder

_AHEAD = 3
"""Episodes per worker that may wait for an earlier one: bounds the memory."""

MakeActor = Callable[[], Actor]
"""If the actor has `begin(episode)`, it is called before each episode; what is random in the actor
must follow from it, because a worker plays whichever episode is next."""
_recipe: RecordConfig | None = None
_make_actor: MakeActor | None = None
_player: _Player | None = None


class _Player:
    """A recorder with its actor; belongs to the thread that made it."""

    def __init__(self, recipe: RecordConfig, make_actor: MakeActor | None) -> None:
        self._actor = make_actor() if make_actor else None
        self.recorder = SimulatedRecorder(recipe, self._actor)

    def play(self, number: int) -> list[Frame]:
        begin = getattr(self._actor, "begin", None)
        if begin is not None:
            begin(number)
        return self.recorder.episode(number)


def episodes(
    recipe: RecordConfig, count: int, workers: int = 1, make_actor: MakeActor | None = None
) -> Iterator[list[Frame]]:
    """Episodes 0 … count − 1, the same ones whatever the number of workers.

    Args:
        recipe: what is played.
        count: number of episodes.
        workers: processes, each with a simulator and a renderer; 1 for none but this one.
        make_actor: makes what moves the arms instead of the expert; with several workers it is
            pickled and called in each of them.

    Raises:
        DatasetError: the expert keeps failing, or a worker died.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        player = _Player(recipe, make_actor)
        try:
            for number in range(count):
                yield player.play(number)
        finally:
            player.recorder.close()
        return
    # OpenGL and its threads do not outlive a fork
    pool = ProcessPoolExecutor(
        min(workers, count), multiprocessing.get_context("spawn"), _start, (recipe, make_actor)
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


def _start(recipe: RecordConfig, make_actor: MakeActor | None) -> None:
    global _recipe, _make_actor
    _recipe, _make_actor = recipe, make_actor
    # each process has one core for itself: torch reads this when it is loaded
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C reaches the whole process group; the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _play(number: int) -> list[Frame]:
    global _player
    assert _recipe is not None
    if _player is None:
        # here and not in `_start`, so that its errors reach the parent
        _player = _Player(_recipe, _make_actor)
    return _player.play(number)
