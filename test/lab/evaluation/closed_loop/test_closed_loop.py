"""Episodes through scheduler, limits and controllers on the simulator's clock.

Faults pinned: a loop in which even a perfect policy fails, a delay that is not simulated, success
for holding the position or for the wrong cube or arm, outcomes that depend on chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_lab.evaluation.closed_loop.agents import ExpertAgent, PolicyAgent, make_agent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Outcome, Settings, SetupError, Trial
from pi05_lab.evaluation.closed_loop.summary import Summary
from pi05_lab.evaluation.closed_loop.trials import (
    CONDITIONS,
    chosen_tasks,
    plan_trials,
    play_trials,
    spread,
)
from pi05_lab.sim.tasks import Task, wordings
from pi05_ros.robot_config import RobotConfig, read_robot_config
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation

SETTINGS = Settings(delay_s=0.16, replan_ticks=8, limit_s=6.0)


@pytest.fixture(scope="module")
def robot() -> RobotConfig:
    robot = read_robot_config(Path(__file__).parents[4] / "config" / "aloha.yaml")
    return replace(robot, scheduler=replace(robot.scheduler, method="latest"))


class FixedTask(ExpertAgent):
    """Does one task, for any instruction."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._text = wordings(task)[0]

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        chunk = super().infer(replace(observation, instruction=self._text))
        return replace(chunk, instruction=observation.instruction)


class HoldPosition(ExpertAgent):
    """Commands the current position."""

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        return ActionChunk(
            np.tile(observation.state, (self.horizon, 1)),
            observation.stamp_s,
            self.dt_s,
            observation.instruction,
        )


class ImageRecorder(HoldPosition):
    """Keeps its images."""

    cameras = ("cam_high", "cam_left_wrist")

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Any] = []

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self.images.append(dict(observation.images))
        return super().infer(observation)


def play(make: Callable[[], Any], trials: list[Trial], robot: RobotConfig) -> list[Outcome]:
    return list(play_trials(make, trials, robot, SETTINGS))


@pytest.mark.parametrize("delay_s", [0.0, 0.16])
def test_a_perfect_policy_succeeds_with_and_without_delay(
    robot: RobotConfig, delay_s: float
) -> None:
    counted = spread(chosen_tasks(("touch", "pick")), 3)
    settings = replace(SETTINGS, delay_s=delay_s)
    # Without delay the expert drops the cube in about one of ten picks; with this seed it does not.
    summary = Summary(
        list(play_trials(ExpertAgent, plan_trials(counted, 1), robot, settings)), robot
    )
    for verb in ("touch", "pick"):
        group = summary.group(verb)
        assert group.success.count == group.success.of == 3
        assert group.wrong_object.count == group.wrong_arm.count == 0
        assert group.inference_failures == group.trajectories_rejected == 0


def test_a_delay_is_paid_for(robot: RobotConfig) -> None:
    """The same episode, later by the delay: the arm rests until the first chunk.

    Both delays are longer than the proof of the start, which the first inference waits for.
    """
    trials = plan_trials([(Task("touch", "left", "green"), 1)], 0)
    times = [
        next(play_trials(ExpertAgent, trials, robot, replace(SETTINGS, delay_s=delay_s))).done_at_s
        for delay_s in (0.1, 0.5)
    ]
    assert times[0] is not None and times[1] is not None
    assert 0.3 < times[1] - times[0] < 0.5


def test_replanning_is_as_often_as_set(robot: RobotConfig) -> None:
    trials = plan_trials([(Task("wave", "left"), 1)], 0)
    counts = []
    for ticks in (10, 50):
        settings = Settings(replan_ticks=ticks, limit_s=2.0)
        (outcome,) = play_trials(HoldPosition, trials, robot, settings)
        counts.append(outcome.inferences)
    assert counts[0] == pytest.approx(10, abs=1) and counts[1] == pytest.approx(2, abs=1)


def test_holding_the_position_is_not_a_success(robot: RobotConfig) -> None:
    counted = [(task, 1) for task in chosen_tasks(("touch", "place", "wave"), ("red",), ("left",))]
    trials = plan_trials([*counted, (Task("home"), 3)], 0)
    settings = replace(SETTINGS, limit_s=1.5)
    outcomes = list(play_trials(HoldPosition, trials, robot, settings))
    assert [outcome.done for outcome in outcomes] == [False] * 6
    assert not any(outcome.wrong_object or outcome.wrong_arm for outcome in outcomes)


@pytest.mark.parametrize(
    ("did", "wrong_object", "wrong_arm"),
    [
        (Task("touch", "left", "blue"), True, False),
        (Task("touch", "right", "red"), False, True),
        (Task("touch", "right", "blue"), True, True),
    ],
)
def test_the_wrong_cube_or_arm_is_noticed(
    robot: RobotConfig, did: Task, wrong_object: bool, wrong_arm: bool
) -> None:
    trials = plan_trials([(Task("touch", "left", "red"), 1)], 1)
    (outcome,) = play_trials(partial(FixedTask, did), trials, robot, replace(SETTINGS, limit_s=3.0))
    assert not outcome.done
    assert (outcome.wrong_object, outcome.wrong_arm) == (wrong_object, wrong_arm)


def test_a_wave_with_the_other_arm_is_the_wrong_arm(robot: RobotConfig) -> None:
    trials = plan_trials([(Task("wave", "left"), 1)], 0)
    (outcome,) = play(partial(FixedTask, Task("wave", "right")), trials, robot)
    assert outcome.wrong_arm and not outcome.wrong_object and not outcome.done


@pytest.mark.slow
def test_ablations_show_language_and_vision_conditioning(robot: RobotConfig) -> None:
    """The expert uses the instruction and no image; a fixed task uses neither."""
    counted = [(Task("touch", "left", "green"), 4)]
    settings = replace(SETTINGS, limit_s=3.0)
    trials = plan_trials(counted, 0, conditions=CONDITIONS)
    expert = Summary(list(play_trials(ExpertAgent, trials, robot, settings)), robot)
    assert expert.lowers_success("shuffled", "touch") is True
    assert expert.lowers_success("black", "touch") is False
    assert expert.group("touch", "shuffled").instructed.share > 0.5
    outcomes = play_trials(partial(FixedTask, counted[0][0]), trials[:8], robot, settings)
    fixed = Summary(list(outcomes), robot)
    assert fixed.lowers_success("shuffled", "touch") is False
    assert fixed.lowers_success("shuffled", "pick") is None


def test_black_images_are_black_and_others_are_rendered(robot: RobotConfig) -> None:
    policy = ImageRecorder()
    agent = PolicyAgent(policy, (40, 30))
    loop = ClosedLoop(agent, robot, Settings(limit_s=0.1, replan_ticks=50))
    counted = [(Task("touch", "left", "red"), 1)]
    try:
        for trial in plan_trials(counted, 0, conditions=("plain", "black")):
            loop.play(trial)
    finally:
        agent.close()
    plain, black = policy.images
    assert set(plain) == {"cam_high", "cam_left_wrist"}
    assert plain["cam_high"].shape == (30, 40, 3) and plain["cam_high"].std() > 10
    assert black["cam_high"].shape == (30, 40, 3) and not black["cam_high"].any()


def test_workers_change_nothing_and_seeds_repeat(robot: RobotConfig) -> None:
    make = partial(make_agent, "expert")
    trials = plan_trials(spread(chosen_tasks(("touch",)), 3), 5)
    alone = list(play_trials(make, trials, robot, SETTINGS))
    shared = list(play_trials(make, trials, robot, SETTINGS, workers=2))
    assert alone == shared
    others = plan_trials(spread(chosen_tasks(("touch",)), 3), 6)
    assert [o.scenes[0] for o in alone] != [o.scenes[0] for o in play(make, others[:1], robot)]


def test_figures_are_named_by_verb(robot: RobotConfig) -> None:
    trials = plan_trials([(Task("wave", "left"), 1), (Task("home"), 1)], 0)
    outcomes = list(play_trials(HoldPosition, trials, robot, Settings(limit_s=0.2)))
    assert Summary(outcomes, robot).figures() == {
        "wave_success": 0.0, "wave_wrong_arm": 0.0, "home_success": 0.0,
    }  # fmt: skip


class Failing(HoldPosition):
    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        raise RuntimeError("broken")


def test_failed_inferences_are_counted(robot: RobotConfig) -> None:
    trials = plan_trials([(Task("wave", "left"), 1)], 0)
    (outcome,) = play_trials(Failing, trials, robot, Settings(limit_s=0.3))
    assert outcome.failures == outcome.inferences == robot.faults.max_failures
    assert outcome.error.endswith("failed in a row, the last with RuntimeError: broken")


def test_a_policy_that_does_not_fit_is_refused(robot: RobotConfig) -> None:
    class Small(HoldPosition):
        state_dim = action_dim = 7

    class OtherCamera(HoldPosition):
        cameras = ("cam_low",)

        def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
            raise AssertionError("must not be reached")

    with pytest.raises(SetupError, match="7 states"):
        ClosedLoop(Small(), robot, SETTINGS)
    with pytest.raises(SetupError, match="cam_low"):
        ClosedLoop(OtherCamera(), robot, SETTINGS)
    slow = replace(robot, parameters=replace(robot.parameters, control_rate_hz=30.0))
    with pytest.raises(SetupError, match="control_rate_hz"):
        ClosedLoop(HoldPosition(), slow, SETTINGS)
