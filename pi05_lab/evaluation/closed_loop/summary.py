"""What many episodes say: rates with intervals, controls, and a call that gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pi05_lab.evaluation.closed_loop.agents import Agent, PolicyAgent, make_agent
from pi05_lab.evaluation.closed_loop.episode import Outcome, Settings
from pi05_lab.evaluation.closed_loop.trial_pool import play_trials
from pi05_lab.evaluation.closed_loop.trials import Condition, chosen_tasks, plan_trials, spread
from pi05_lab.evaluation.statistics import wilson_interval
from pi05_lab.sim.tasks import CUBE_VERBS, VERBS, Task
from pi05_ros import types
from pi05_ros.robot_config import RobotConfig, read_robot_config

CONTROLS: tuple[Condition, ...] = ("shuffled", "black")


@dataclass(frozen=True)
class Rate:
    """So many of so many."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """0 … 1; 0 of none."""
        return self.count / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's, 95 %."""
        return wilson_interval(self.count, self.of)

    def below(self, other: Rate) -> bool:
        """Whether the whole interval lies below the other's."""
        mine, others = self.interval, other.interval
        return mine is not None and others is not None and mine[1] < others[0]

    def to_dict(self) -> dict[str, Any]:
        interval = self.interval
        return {
            "count": self.count,
            "of": self.of,
            "share": round(self.share, 4),
            "wilson_95": None if interval is None else [round(end, 4) for end in interval],
        }


@dataclass(frozen=True)
class Group:
    """Episodes that belong together."""

    success: Rate
    told: Rate
    """Did what the instruction asked for; differs from success if it was shuffled."""
    wrong_object: Rate
    wrong_arm: Rate
    median_s: float | None
    """Simulated time to success, of those that came to it."""
    clamps: Mapping[str, int]
    """Kind → joints × ticks, all episodes together."""
    commands: int
    """Joints × ticks of the same episodes."""
    inferences: int
    failures: int
    rejected: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], joints: int, tick_s: float) -> Group:
        def rate(attribute: str) -> Rate:
            return Rate(sum(getattr(each, attribute) for each in outcomes), len(outcomes))

        times = [each.done_at_s for each in outcomes if each.done_at_s is not None]
        kinds = sorted({kind for each in outcomes for kind in each.clamps})
        return cls(
            success=rate("done"),
            told=rate("told_done"),
            wrong_object=rate("wrong_object"),
            wrong_arm=rate("wrong_arm"),
            median_s=median(times) if times else None,
            clamps={kind: sum(each.clamps.get(kind, 0) for each in outcomes) for kind in kinds},
            commands=joints * round(sum(each.duration_s for each in outcomes) / tick_s),
            inferences=sum(each.inferences for each in outcomes),
            failures=sum(each.failures for each in outcomes),
            rejected=sum(each.rejected for each in outcomes),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "success": self.success.to_dict(),
            "told": self.told.to_dict(),
            "wrong_object": self.wrong_object.to_dict(),
            "wrong_arm": self.wrong_arm.to_dict(),
            "median_s": self.median_s,
            "clamps": dict(self.clamps),
            "commands": self.commands,
            "inferences": self.inferences,
            "inference_failures": self.failures,
            "trajectories_rejected": self.rejected,
        }


@dataclass(frozen=True)
class Summary:
    """An evaluation's outcomes, grouped."""

    outcomes: tuple[Outcome, ...]
    joints: int
    """Of the robot."""
    tick_s: float
    """Of its control."""

    def group(self, verb: str, condition: Condition = "plain") -> Group:
        return self._group(
            each
            for each in self.outcomes
            if each.trial.task.verb == verb and each.trial.condition == condition
        )

    def task_group(self, task: Task, condition: Condition = "plain") -> Group:
        return self._group(
            each
            for each in self.outcomes
            if each.trial.task == task and each.trial.condition == condition
        )

    def verbs(self, condition: Condition = "plain") -> list[str]:
        """Those that were played."""
        played = {e.trial.task.verb for e in self.outcomes if e.trial.condition == condition}
        return [verb for verb in VERBS if verb in played]

    def tasks(self, condition: Condition = "plain") -> list[Task]:
        """Those that were played, in their order."""
        return list(
            dict.fromkeys(e.trial.task for e in self.outcomes if e.trial.condition == condition)
        )

    def listens(self, verb: str) -> bool | None:
        """Whether another instruction makes it do the task less often; None if not played."""
        return self._drops(verb, "shuffled")

    def looks(self, verb: str) -> bool | None:
        """Whether black pictures make it do the task less often; None if not played."""
        return self._drops(verb, "black")

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

    def _drops(self, verb: str, condition: Condition) -> bool | None:
        if verb not in self.verbs(condition):
            return None
        return self.group(verb, condition).success.below(self.group(verb).success)

    def _group(self, outcomes: Iterable[Outcome]) -> Group:
        return Group.of(list(outcomes), self.joints, self.tick_s)


def evaluate_agent(
    make: Callable[[], Agent],
    counted: Sequence[tuple[Task, int]],
    seed: int,
    *,
    robot: RobotConfig,
    settings: Settings,
    held_out: bool = True,
    controls: bool = False,
    workers: int = 1,
    on_outcome: Callable[[Outcome, int], None] = lambda outcome, total: None,
) -> Summary:
    """Play all episodes, and those of the controls.

    Args:
        make: makes an agent, in each worker.
        counted: tasks and how many episodes of each.
        seed: of places, wordings and noise.
        robot: joints, controllers and control settings.
        settings: delay, replanning, time limit.
        held_out: wordings that no training sees, else those that it does.
        controls: play all again with another task's instruction, and those with a cube with black
            pictures; places and noise stay.
        workers: processes.
        on_outcome: called after each episode, with the number of all.

    Raises:
        SetupError: policy, robot and simulator do not fit together.
        WorkerDied: a process was killed.
    """
    trials = plan_trials(counted, seed, held_out=held_out)
    if controls:
        trials += plan_trials(counted, seed, held_out=held_out, condition="shuffled")
        seen = [(task, count) for task, count in counted if task.verb in CUBE_VERBS]
        trials += plan_trials(seen, seed, held_out=held_out, condition="black")
    outcomes = []
    for outcome in play_trials(make, trials, robot, settings, workers):
        outcomes.append(outcome)
        on_outcome(outcome, len(trials))
    return Summary(tuple(outcomes), len(robot.joints), robot.dt_s)


def evaluate(
    policy: types.Policy,
    tasks: Sequence[Task],
    episodes: int,
    seed: int,
    *,
    settings: Settings | None = None,
    robot: RobotConfig | None = None,
    held_out: bool = True,
    controls: bool = False,
    size_px: tuple[int, int] | None = None,
) -> Summary:
    """Evaluate a policy that is in memory, in this process.

    Its noise goes on from episode to episode, so two calls agree if the policy begins alike.

    Args:
        policy: looks through rendered cameras.
        tasks: what is done.
        episodes: of each task.
        seed: of places and wordings.
        settings: delay, replanning, time limit.
        robot: joints, controllers and control settings; None reads config/aloha.yaml.
        held_out: wordings that no training sees, else those that it does.
        controls: see `evaluate_agent`.
        size_px: width and height of the pictures; None is the policy's own.
    """
    return evaluate_agent(
        lambda: PolicyAgent(lambda: policy, size_px),
        [(task, episodes) for task in tasks],
        seed,
        robot=robot or read_robot_config(),
        settings=settings or Settings(),
        held_out=held_out,
        controls=controls,
    )


def training_figures(checkpoint: Path) -> Mapping[str, float]:
    """A short evaluation of a checkpoint folder: `evaluation.function` of a training's YAML file.

    12 episodes of each verb with 160 ms of delay, at places of their own, in this process, with
    the training's number of CPU threads, which is the whole process's.
    """
    return evaluate_agent(
        lambda: make_agent(str(checkpoint), threads=None),
        spread(chosen_tasks(VERBS), 12),
        TRAINING_SEED,
        robot=read_robot_config(),
        settings=Settings(delay_s=0.16),
    ).figures()


TRAINING_SEED = 1_000_003
"""Not the default of `pi05 sim-eval`: what a training was chosen by is not what it is judged by."""
