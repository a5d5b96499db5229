"""Plays trials, in this process or in several; the outcomes are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pi05_lab.evaluation.closed_loop.agents import Agent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Outcome, Settings
from pi05_lab.evaluation.closed_loop.trials import Trial
from pi05_ros.robot_config import RobotConfig


class WorkerDied(RuntimeError):
    """A process ended in the midst of an episode."""


def play_trials(
    make: Callable[[], Agent],
    trials: Sequence[Trial],
    robot: RobotConfig,
    settings: Settings,
    workers: int = 1,
) -> Iterator[Outcome]:
    """The outcomes, in the order of the trials.

    Args:
        make: makes an agent; with several workers, it is pickled and called in each of them.
        trials: to be played.
        robot: joints, controllers and control settings.
        settings: delay, replanning, time limit.
        workers: processes; 1 for none but this one.

    Raises:
        SetupError: policy, robot and simulator do not fit together.
        WorkerDied: a process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = min(workers, len(trials))
    if workers <= 1:
        agent = make()
        try:
            loop = ClosedLoop(agent, robot, settings)
            for trial in trials:
                yield loop.play(trial)
        finally:
            agent.close()
        return
    # OpenGL and its threads do not outlive a fork
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start,
        (make, robot, settings),
    )
    try:
        yield from pool.map(_play, trials)
    except BrokenProcessPool:
        raise WorkerDied(
            "an evaluating process was killed, by the lack of memory perhaps: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_parts: tuple[Callable[[], Agent], RobotConfig, Settings] | None = None
_loop: ClosedLoop | None = None


def _start(make: Callable[[], Agent], robot: RobotConfig, settings: Settings) -> None:
    global _parts
    # each process has one core for itself: torch and Mesa read these when they are loaded
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ[name] = "1"
    # Ctrl-C reaches the whole process group; the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _parts = make, robot, settings


def _play(trial: Trial) -> Outcome:
    global _loop
    assert _parts is not None
    if _loop is None:
        # here and not in `_start`, so that its errors reach the parent
        make, robot, settings = _parts
        _loop = ClosedLoop(make(), robot, settings)
    return _loop.play(trial)
