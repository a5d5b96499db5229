"""Touches of one checkpoint in the node's runner: CHECKPOINT RESULT.json DELAY_TICKS EPISODES."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import policy_comparison  # noqa: F401 - registers the narrow ResNet
from pi05_lab.evaluation.closed_loop.agents import PolicyAgent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Settings
from pi05_lab.evaluation.closed_loop.trials import chosen_tasks, plan_trials, spread
from pi05_ros.adapters.factory import open_policy
from pi05_ros.robot_config import read_robot_config
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import ActionChunk, ActionPrefix, Observation, Policy

SCHEDULER = "latest"
SEED = 21


class TimedPolicy:
    """A policy that notes how long each inference takes."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        started_s = time.perf_counter()
        chunk = self._policy.infer(observation, prefix)
        self.seconds.append(time.perf_counter() - started_s)
        return chunk


class Commands:
    """The commanded positions of one episode, and how smooth they are."""

    def __init__(self) -> None:
        self.largest_step = 0.0
        self.squares, self.count = 0.0, 0
        self._positions: list[np.ndarray] = []

    def add(self, runner: PolicyRunner, tick: Tick, now_s: float) -> bool:
        if tick.trajectory is not None:
            self._positions.append(tick.trajectory.positions[0])
        return True

    def end_episode(self, dt_s: float, arm: np.ndarray) -> None:
        positions = np.array(self._positions)[:, arm] if self._positions else np.empty((0, 12))
        self._positions.clear()
        if len(positions) > 4:
            self.largest_step = max(
                self.largest_step, float(np.abs(np.diff(positions, axis=0)).max())
            )
            jerk = np.diff(positions, n=3, axis=0) / dt_s**3
            self.squares += float((jerk**2).sum())
            self.count += jerk.size


def main(checkpoint: str, result: str, ticks: str, episodes: str) -> int:
    policy = open_policy(checkpoint, device="cpu", seed=0, threads=1)
    timed = TimedPolicy(policy)
    robot = read_robot_config()
    robot = replace(robot, scheduler=replace(robot.scheduler, method=SCHEDULER))
    agent = PolicyAgent(timed)
    loop = ClosedLoop(agent, robot, Settings(delay_s=int(ticks) * robot.dt_s, limit_s=10.0))
    trials = plan_trials(spread(chosen_tasks(["touch"]), int(episodes)), SEED)
    commands, outcomes = Commands(), []
    for trial in trials:
        outcomes.append(loop.play(trial, commands.add))
        commands.end_episode(robot.dt_s, ~robot.joints.gripper)
    agent.close()
    network = getattr(policy, "model", None) or getattr(policy, "_network")  # noqa: B009
    found = {
        "episodes": len(outcomes),
        "done": sum(outcome.done for outcome in outcomes),
        "wrong": sum(outcome.wrong_object or outcome.wrong_arm for outcome in outcomes),
        "failures": sum(outcome.failures for outcome in outcomes),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "ms_per_chunk": 1e3 * float(np.median(timed.seconds)),
        "largest_step": commands.largest_step,
        "jerk": float(np.sqrt(commands.squares / max(1, commands.count))),
        "description": policy.description,
    }
    Path(result).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
