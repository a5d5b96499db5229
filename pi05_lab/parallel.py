"""The process pool of every command that runs many independent tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_AHEAD = 3
"""Tasks per worker whose results may wait for an earlier one: bounds the memory."""
KILLED = "a worker process was killed (out of memory?): try fewer --workers"


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of a task."""


def run_tasks(
    make: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    workers: int = 1,
    *,
    ordered: bool = True,
    isolated: bool = False,
    gpus: Sequence[str] = (),
) -> Iterator[Result]:
    """Results of `make()(task)` for every task.

    Args:
        make: makes the function that runs a task, once in each process. With several workers it
            is pickled. If the function has `close()`, it is called after the last task that runs
            in this process.
        tasks: pickled with several workers.
        workers: processes; 1 runs the tasks in this process.
        ordered: results in the order of the tasks, else as they come.
        isolated: use worker processes even for one worker.
        gpus: values of CUDA_VISIBLE_DEVICES that the workers take in turn.

    Raises:
        ValueError: `workers` is less than 1.
        WorkerDied: a worker process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = min(workers, len(tasks))
    if workers <= 1 and not isolated:
        run = make()
        try:
            yield from map(run, tasks)
        finally:
            getattr(run, "close", lambda: None)()
        return
    # The threads of OpenGL, torch and OpenCV do not survive a fork.
    context = multiprocessing.get_context("spawn")
    setup = (_Worker(make), list(gpus), context.Value("i", 0))
    pool = ProcessPoolExecutor(max(workers, 1), context, _start, setup)
    try:
        if ordered:
            yield from _in_order(pool, tasks, TASKS_AHEAD * workers)
        else:
            for future in as_completed([pool.submit(_run, task) for task in tasks]):
                yield future.result()
    except BrokenProcessPool:
        raise WorkerDied(KILLED) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, tasks: Sequence[Any], ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for task in tasks:
        waiting.append(pool.submit(_run, task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Worker(Generic[Task, Result]):
    """Makes the function at the first task, so that its errors reach the parent."""

    def __init__(self, make: Callable[[], Callable[[Task], Result]]) -> None:
        self._make = make
        self._run: Callable[[Task], Result] | None = None

    def __call__(self, task: Task) -> Result:
        if self._run is None:
            self._run = self._make()
        return self._run(task)


_worker: _Worker[Any, Any] | None = None


def _start(worker: _Worker[Any, Any], gpus: Sequence[str], started: Any) -> None:
    global _worker
    _worker = worker
    with started.get_lock():
        index = started.value
        started.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    # One core per process: torch and Mesa read these when they are loaded.
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ[name] = "1"
    # Ctrl-C reaches the whole process group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(task: Any) -> Any:
    assert _worker is not None
    return _worker(task)
