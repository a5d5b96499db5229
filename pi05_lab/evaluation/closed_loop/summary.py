"""Summary of a closed-loop evaluation: rates with confidence intervals, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pi05_lab.evaluation.closed_loop.agents import make_agent
from pi05_lab.evaluation.closed_loop.episode import CLAMPS, Condition, Outcome, Settings
from pi05_lab.evaluation.closed_loop.trials import chosen_tasks, plan_trials, play_trials, spread
from pi05_lab.evaluation.statistics import wilson_interval
from pi05_lab.sim.tasks import CUBE_VERBS, VERBS, Task
from pi05_ros.robot_config import RobotConfig, read_robot_config

TRAINING_SEED = 1_000_003
"""Differs from the default of `pi05 sim-eval`: training and its evaluation use other episodes."""


@dataclass(frozen=True)
class Rate:
    """A proportion."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """0 … 1; 0 without trials."""
        return self.count / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's, 95 %."""
        return wilson_interval(self.count, self.of)

    def to_dict(self) -> dict[str, Any]:
        ends = self.interval and [round(end, 4) for end in self.interval]
        share = round(self.share, 4)
        return {"count": self.count, "of": self.of, "share": share, "wilson_95": ends}


@dataclass(frozen=True)
class Group:
    """Figures of several episodes."""

    success: Rate
    instructed: Rate
    """Success at the instruction's task; differs from `success` if shuffled."""
    wrong_object: Rate
    wrong_arm: Rate
    median_s: float | None
    """Simulated time to success, of the successful episodes."""
    clamps: Mapping[str, int]
    """Kind → joints × ticks."""
    commands: int
    """Joints × ticks."""
    inferences: int
    inference_failures: int
    trajectories_rejected: int

    def to_dict(self) -> dict[str, Any]:
        """As in metrics.json."""
        names = {"instructed": "told"}
        return {
            names.get(name, name): value.to_dict() if isinstance(value, Rate) else value
            for name, value in vars(self).items()
        }


class Summary:
    """Outcomes of an evaluation, by verb, task and condition."""

    def __init__(self, outcomes: Sequence[Outcome], robot: RobotConfig) -> None:
        self.outcomes, self._robot = outcomes, robot

    def verbs(self, condition: Condition = "plain") -> list[str]:
        """With episodes in this condition, in the order of `VERBS`."""
        played = {task.verb for task in self.tasks(condition)}
        return [verb for verb in VERBS if verb in played]

    def tasks(self, condition: Condition = "plain") -> list[Task]:
        """With episodes in this condition, in their order."""
        trials = (outcome.trial for outcome in self.outcomes)
        return list(dict.fromkeys(t.task for t in trials if t.condition == condition))

    def group(self, which: str | Task, condition: Condition = "plain") -> Group:
        """Figures of a verb or of one of its tasks."""
        outcomes = [
            each
            for each in self.outcomes
            if each.trial.condition == condition
            and which in (each.trial.task, each.trial.task.verb)
        ]

        def rate(attribute: str) -> Rate:
            return Rate(sum(getattr(each, attribute) for each in outcomes), len(outcomes))

        times_s = [each.done_at_s for each in outcomes if each.done_at_s is not None]
        ticks = round(sum(each.duration_s for each in outcomes) / self._robot.dt_s)
        return Group(
            success=rate("done"),
            instructed=rate("instructed_done"),
            wrong_object=rate("wrong_object"),
            wrong_arm=rate("wrong_arm"),
            median_s=median(times_s) if times_s else None,
            clamps={kind: sum(each.clamps[kind] for each in outcomes) for kind in sorted(CLAMPS)},
            commands=len(self._robot.joints) * ticks,
            inferences=sum(each.inferences for each in outcomes),
            inference_failures=sum(each.failures for each in outcomes),
            trajectories_rejected=sum(each.rejected for each in outcomes),
        )

    def lowers_success(self, condition: Condition, verb: str) -> bool | None:
        """Whether the ablation's interval lies below the baseline's; None if not measured."""
        interval = self.group(verb, condition).success.interval
        baseline = self.group(verb).success.interval
        return None if interval is None or baseline is None else interval[1] < baseline[0]

    def figures(self) -> dict[str, float]:
        """Name → figure, for a training's log."""
        found = {}
        for verb in self.verbs():
            group = self.group(verb)
            found[f"{verb}_success"] = group.success.share
            if verb in CUBE_VERBS:
                found[f"{verb}_wrong_object"] = group.wrong_object.share
            if verb != "home":
                found[f"{verb}_wrong_arm"] = group.wrong_arm.share
        return found


def training_figures(checkpoint: Path) -> Mapping[str, float]:
    """A short evaluation of a checkpoint folder: `evaluation.function` of a training's YAML file.

    12 episodes of each verb with a delay of 160 ms, in this process, with the training's number of
    CPU threads, which applies to the whole process.
    """
    robot = read_robot_config()
    trials = plan_trials(spread(chosen_tasks(VERBS), 12), TRAINING_SEED)
    outcomes = play_trials(
        lambda: make_agent(str(checkpoint), threads=None), trials, robot, Settings(delay_s=0.16)
    )
    return Summary(list(outcomes), robot).figures()
