"""Schedulers against delays with a policy in the simulated ALOHA: touching a cube."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np

from pi05_lab.bench.toy_task import DELAYS, REPLAN_INTERVAL_S, Delay, Episode
from pi05_lab.evaluation import statistics as measures
from pi05_lab.evaluation.closed_loop.agents import make_agent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Settings
from pi05_lab.evaluation.closed_loop.trials import CUBES, Trial, chosen_tasks
from pi05_lab.sim.scene import JOINT_NAMES
from pi05_lab.sim.tasks import Task, instruction
from pi05_ros.robot_config import read_robot_config
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import FloatArray

METHODS = ("sync", "latest", "blend", "temporal_ensemble", "rtc")
"""With the node's defaults."""
LIMIT_S = 8.0
STALL_RAD_S = 0.02
"""Slower than this after the start and before the touch, the arms stall."""
MOVED_RAD = 0.05
"""Away from a twin that was not told, the arms have reacted."""
CHANGE_S = 0.6
REACTION_LIMIT_S = 1.5
"""Arms that have not reacted by then count as this late, so that no slow reaction is left out."""
REACTION_EVERY = 5
"""Reactions take two more episodes each: they are measured on every fifth seed."""
_ARM = np.array(["gripper" not in name for name in JOINT_NAMES])


@dataclass
class _Recording:
    """What the measures need of an episode, tick by tick; arm joints in rad."""

    loop: ClosedLoop
    dt_s: float
    executed: list[FloatArray] = field(default_factory=list)
    targets: list[FloatArray] = field(default_factory=list)
    seam_jumps: list[float] = field(default_factory=lambda: [0.0])
    ages_s: list[float] = field(default_factory=list)
    _expected: FloatArray | None = None

    def watch(self, runner: PolicyRunner, tick: Tick, now_s: float) -> bool:
        self.executed.append(self.loop.sim.positions()[_ARM])
        ahead_s = now_s + self.dt_s * np.arange(2, dtype=np.float64)
        targets = runner.scheduler.targets(ahead_s)
        if targets is None:
            return True
        asked = targets[:, _ARM]
        if tick.chunks and self._expected is not None:
            self.seam_jumps.append(float(np.linalg.norm(asked[0] - self._expected)))
        self._expected = asked[1]
        self.targets.append(asked[0])
        self.ages_s.append(now_s - runner.scheduler.stamp_s(now_s))
        return True


class ReachBench:
    """One process's simulator and policy."""

    def __init__(self, checkpoint: str) -> None:
        self._agent = make_agent(checkpoint)
        self._robot = read_robot_config()

    def episode(self, method: str, delay: Delay, seed: int) -> Episode:
        """A touch from the seed's places, with the seed's arm, cube and wording."""
        loop = self._loop(method)
        trial = self._trial(seed)
        recording = _Recording(loop, self._robot.dt_s)
        rng = np.random.default_rng([seed, 1])
        outcome = loop.play(trial, recording.watch, partial(delay.draw, rng))
        dt_s = recording.dt_s
        executed, targets = np.stack(recording.executed), np.stack(recording.targets)
        started = int(np.argmax(np.linalg.norm(executed - executed[0], axis=1) > 1e-3))
        moving = executed[started:]
        speeds = np.linalg.norm(np.diff(moving, axis=0), axis=1) / dt_s
        reaction = math.nan
        if seed % REACTION_EVERY == 0:
            reaction = self._reaction_s(method, delay, trial)
        return Episode(
            method,
            delay.name,
            seed,
            outcome.done and not (outcome.wrong_object or outcome.wrong_arm),
            LIMIT_S if outcome.done_at_s is None else outcome.done_at_s,
            float((speeds[2:] < STALL_RAD_S).sum() * dt_s),
            measures.largest_step(targets),
            measures.largest_acceleration(targets, dt_s),
            max(recording.seam_jumps),
            measures.rms_jerk(moving, dt_s),
            measures.log_dimensionless_jerk(moving, dt_s),
            measures.spectral_arc_length(moving, dt_s),
            float(np.mean(recording.ages_s)),
            reaction,
        )

    def close(self) -> None:
        self._agent.close()

    def _loop(self, method: str) -> ClosedLoop:
        scheduler = replace(
            self._robot.scheduler, method=method, replan_interval_s=REPLAN_INTERVAL_S
        )
        robot = replace(self._robot, scheduler=scheduler)
        return ClosedLoop(self._agent, robot, Settings(limit_s=LIMIT_S))

    def _trial(self, seed: int) -> Trial:
        tasks = chosen_tasks(("touch",))
        task = tasks[seed % len(tasks)]
        text = instruction(task, np.random.default_rng([seed, 0]), True)
        return Trial(task, seed, seed, task, text)

    def _reaction_s(self, method: str, delay: Delay, trial: Trial) -> float:
        """Until the arms are elsewhere than those of a twin that is not told of another cube.

        NaN where the touch was done before the change.
        """
        change_s = CHANGE_S + delay.high_s
        cubes = [cube for cube in CUBES if cube != trial.task.color]
        other = Task("touch", trial.task.side, cubes[trial.seed % len(cubes)])
        text = instruction(other, np.random.default_rng([trial.seed, 2]), True)
        courses = []
        for told in (False, True):
            loop = self._loop(method)
            course: list[FloatArray] = []

            def watch(
                runner: PolicyRunner,
                _: Tick,
                now_s: float,
                loop: ClosedLoop = loop,
                told: bool = told,
                course: list[FloatArray] = course,
            ) -> bool:
                if told and now_s >= change_s:
                    runner.set_instruction(text)
                course.append(loop.sim.positions()[_ARM])
                return now_s < change_s + REACTION_LIMIT_S

            loop.play(trial, watch, partial(delay.draw, np.random.default_rng([trial.seed, 1])))
            courses.append(np.stack(course))
        return reaction_s(courses[0], courses[1], change_s, self._robot.dt_s)


def reaction_s(course: FloatArray, changed: FloatArray, change_s: float, dt_s: float) -> float:
    """When two motions [n, n_joints] and [m, n_joints] are `MOVED_RAD` apart, after `change_s`.

    `REACTION_LIMIT_S` at most, also where they never are; NaN if one ended before the change.
    """
    ticks = min(len(course), len(changed))
    if ticks * dt_s <= change_s:
        return math.nan
    apart = np.linalg.norm(course[:ticks] - changed[:ticks], axis=1) > MOVED_RAD
    if not apart.any():
        return REACTION_LIMIT_S
    return min(float(np.argmax(apart) * dt_s - change_s), REACTION_LIMIT_S)


def run_all(checkpoint: str, seeds: range, workers: int) -> Iterator[Episode]:
    """All methods × delays × seeds, seed by seed, so that an early end leaves whole comparisons."""
    jobs = [(m, d, seed) for seed, m, d in product(seeds, METHODS, DELAYS)]
    if workers == 1:
        bench = ReachBench(checkpoint)
        try:
            yield from (bench.episode(*job) for job in jobs)
        finally:
            bench.close()
        return
    # OpenGL and its threads do not outlive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (checkpoint,)) as pool:
        yield from pool.map(_episode, jobs)


_checkpoint = ""
_bench: ReachBench | None = None


def _start(checkpoint: str) -> None:
    global _checkpoint
    # each process has one core for itself: torch and Mesa read these when they are loaded
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _checkpoint = checkpoint


def _episode(job: tuple[str, Delay, int]) -> Episode:
    global _bench
    if _bench is None:
        _bench = ReachBench(_checkpoint)
    return _bench.episode(*job)
