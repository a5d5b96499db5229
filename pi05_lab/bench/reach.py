"""The reaching task of the scheduler benchmark: a policy touches a cube in the simulated ALOHA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np

from pi05_lab.bench.toy_task import (
    DELAYS,
    REPLAN_INTERVAL_S,
    Delay,
    Episode,
    first_motion,
    motion_measures,
)  # fmt: skip
from pi05_lab.evaluation.closed_loop.agents import make_agent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Settings, Trial
from pi05_lab.evaluation.closed_loop.trials import CUBES, chosen_tasks
from pi05_lab.parallel import run_tasks
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.scene import JOINT_NAMES
from pi05_lab.sim.tasks import Task, instruction
from pi05_ros.robot_config import read_robot_config
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import FloatArray

METHODS = ("sync", "latest", "blend", "temporal_ensemble", "rtc")
"""With the node's defaults."""
LIMIT_S = 8.0
STALL_RAD_S = 0.02
"""Arms in motion that are slower stall."""
REACTION_RAD = 0.05
"""Distance from a control rollout that counts as a reaction."""
CHANGE_S = 0.6
REACTION_LIMIT_S = 1.5
"""Reaction time of arms that do not react, so that the mean includes slow reactions."""
REACTION_EVERY = 5
"""A reaction takes two more episodes: it is measured on every fifth seed."""
_ARM = np.array(["gripper" not in name for name in JOINT_NAMES])


@dataclass
class _Recording:
    """An episode by control tick; arm joints in rad."""

    sim: SimulatedAloha
    dt_s: float
    executed: list[FloatArray] = field(default_factory=list)
    targets: list[FloatArray] = field(default_factory=list)
    jumps: list[float] = field(default_factory=lambda: [0.0])
    ages_s: list[float] = field(default_factory=list)
    _expected: FloatArray | None = None

    def add(self, runner: PolicyRunner, tick: Tick, now_s: float) -> bool:
        self.executed.append(self.sim.positions()[_ARM])
        ahead_s = now_s + self.dt_s * np.arange(2, dtype=np.float64)
        targets = runner.scheduler.targets(ahead_s)
        if targets is None:
            return True
        targets = targets[:, _ARM]
        if tick.chunks and self._expected is not None:
            self.jumps.append(float(np.linalg.norm(targets[0] - self._expected)))
        self._expected = targets[1]
        self.targets.append(targets[0])
        self.ages_s.append(now_s - runner.scheduler.stamp_s(now_s))
        return True


class ReachBench:
    """One process's simulator and policy."""

    def __init__(self, checkpoint: str) -> None:
        self._agent = make_agent(checkpoint)
        self._robot = read_robot_config()

    def __call__(self, task: tuple[str, Delay, int]) -> list[Episode]:
        return [self.episode(*task)]

    def episode(self, method: str, delay: Delay, seed: int) -> Episode:
        """One touch with the seed's places, arm, cube and wording."""
        tasks = chosen_tasks(("touch",))
        task = tasks[seed % len(tasks)]
        text = instruction(task, np.random.default_rng([seed, 0]), True)
        trial = Trial(task, seed, seed, task, text)
        loop, dt_s = self._loop(method), self._robot.dt_s
        recording = _Recording(loop.sim, dt_s)
        outcome = loop.play(trial, recording.add, _delays(delay, seed))
        reaction = math.nan if seed % REACTION_EVERY else self._reaction_s(method, delay, trial)
        executed, targets = np.stack(recording.executed), np.stack(recording.targets)
        return Episode(
            variant=method,
            delay=delay.name,
            seed=seed,
            success=outcome.done and not (outcome.wrong_object or outcome.wrong_arm),
            time_s=LIMIT_S if outcome.done_at_s is None else outcome.done_at_s,
            seam_jump=max(recording.jumps),
            action_age_s=float(np.mean(recording.ages_s)),
            reaction_s=reaction,
            **motion_measures(executed[first_motion(executed, 1e-3) :], targets, dt_s, STALL_RAD_S),
        )

    def close(self) -> None:
        self._agent.close()

    def _loop(self, method: str) -> ClosedLoop:
        interval_s = REPLAN_INTERVAL_S
        scheduler = replace(self._robot.scheduler, method=method, replan_interval_s=interval_s)
        robot = replace(self._robot, scheduler=scheduler)
        return ClosedLoop(self._agent, robot, Settings(limit_s=LIMIT_S))

    def _reaction_s(self, method: str, delay: Delay, trial: Trial) -> float:
        """Time to react to an instruction for another cube, from two rollouts."""
        change_s = CHANGE_S + delay.high_s
        cubes = [cube for cube in CUBES if cube != trial.task.color]
        other = Task("touch", trial.task.side, cubes[trial.seed % len(cubes)])
        text = instruction(other, np.random.default_rng([trial.seed, 2]), True)

        def rollout(changed: bool) -> FloatArray:
            loop = self._loop(method)
            positions: list[FloatArray] = []

            def on_tick(runner: PolicyRunner, tick: Tick, now_s: float) -> bool:
                if changed and now_s >= change_s:
                    runner.set_instruction(text)
                positions.append(loop.sim.positions()[_ARM])
                return now_s < change_s + REACTION_LIMIT_S

            loop.play(trial, on_tick, _delays(delay, trial.seed))
            return np.stack(positions)

        return reaction_s(rollout(False), rollout(True), change_s, self._robot.dt_s)


def _delays(delay: Delay, seed: int) -> partial[float]:
    return partial(delay.draw, np.random.default_rng([seed, 1]))


def reaction_s(control: FloatArray, changed: FloatArray, change_s: float, dt_s: float) -> float:
    """Time after `change_s` at which two motions [n, joints], [m, joints] are `REACTION_RAD` apart.

    At most `REACTION_LIMIT_S`, also if they never are; NaN if one ended before the change.
    """
    ticks = min(len(control), len(changed))
    if ticks * dt_s <= change_s:
        return math.nan
    apart = np.linalg.norm(control[:ticks] - changed[:ticks], axis=1) > REACTION_RAD
    reacted_s = float(np.argmax(apart) * dt_s - change_s) if apart.any() else math.inf
    return min(reacted_s, REACTION_LIMIT_S)


def run_all(checkpoint: str, seeds: range, workers: int) -> Iterator[list[Episode]]:
    """One episode of each seed, method and delay, seed by seed."""
    tasks = [(method, delay, seed) for seed, method, delay in product(seeds, METHODS, DELAYS)]
    return run_tasks(partial(ReachBench, checkpoint), tasks, workers)
