"""Both evaluations run the node's runner: each parameter of it has its effect here too.

Fault pinned: evaluations with a factory of their own, in which the approach, the watchdog, the
instruction's limit, `publish` and the URDF's limits were left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_world import (  # type: ignore[import-not-found]
    PARAMS,
    FormulaPolicy,
    make_plan,
    motion,
    notes,
    oracle,
    rewrite,
    run,
    write_bag,
)

from pi05_lab.evaluation.closed_loop import episode as closed_loop
from pi05_lab.evaluation.closed_loop.agents import ExpertAgent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Outcome, Settings, SetupError
from pi05_lab.evaluation.closed_loop.trials import plan_trials
from pi05_lab.evaluation.open_loop import scheduler_replay
from pi05_lab.evaluation.open_loop.runs import Plan
from pi05_lab.evaluation.simulated_executor import SimulatedExecutor
from pi05_lab.sim.tasks import Task
from pi05_ros.robot_config import RobotConfig, RobotConfigError, read_robot_config
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, Observation

ALOHA = Path(__file__).parents[3] / "config" / "aloha.yaml"
TASK = Task("wave", "left")


@pytest.fixture(scope="module")
def robot() -> RobotConfig:
    config = read_robot_config(ALOHA)
    return replace(config, scheduler=replace(config.scheduler, method="latest"))


class Far(ExpertAgent):
    """Wants every joint of the left arm a radian from where it is."""

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        target = observation.state.copy()
        target[0] += 1.0
        chunk = np.tile(target, (self.horizon, 1))
        return ActionChunk(chunk, observation.stamp_s, self.dt_s, observation.instruction)


def play(
    robot: RobotConfig, delay_s: float = 0.0, replan_ticks: int = 0
) -> tuple[Outcome, list[Tick]]:
    """A second of an episode, and its ticks."""
    ticks: list[Tick] = []
    loop = ClosedLoop(Far(), robot, Settings(delay_s, replan_ticks, limit_s=1.0))

    def keep(runner: PolicyRunner, tick: Tick, now_s: float) -> bool:
        ticks.append(tick)
        return True

    return loop.play(plan_trials([(TASK, 1)], 0)[0], keep), ticks


def largest_step(ticks: list[Tick]) -> float:
    starts = [tick.trajectory.positions[0] for tick in ticks if tick.trajectory is not None]
    return float(np.abs(np.diff(starts, axis=0)).max())


def test_a_far_first_command_is_approached_or_refused_in_the_simulator(robot: RobotConfig) -> None:
    faults = replace(robot.faults, first_command_distance=0.5, first_command_speed=0.1)
    _, slow = play(replace(robot, faults=faults))
    _, quick = play(replace(robot, faults=replace(faults, first_command_distance=10.0)))
    assert largest_step(slow) < 0.3 * largest_step(quick)
    _, refused = play(replace(robot, faults=replace(faults, first_command="refuse")))
    assert all(tick.trajectory is None for tick in refused)


def test_trajectories_are_published_on_change_alone_where_the_file_says_so(
    robot: RobotConfig,
) -> None:
    rare = replace(robot, parameters=replace(robot.parameters, publish="on_change"))
    counts = [
        sum(tick.trajectory is not None for tick in play(each, replan_ticks=25)[1])
        for each in (robot, rare)
    ]
    assert counts[1] < counts[0] / 3


def test_an_inference_that_takes_too_long_is_a_hang_and_its_result_is_not_used(
    robot: RobotConfig,
) -> None:
    slow = replace(robot, faults=replace(robot.faults, hang_timeout_s=0.2))
    outcome, ticks = play(slow, delay_s=0.5)
    assert outcome.error.startswith("policy: no answer for 0.2 s, limit 0.2 s")
    # once for each inference
    assert sum(len(tick.failures) for tick in ticks) == 2
    assert not any(tick.chunks for tick in ticks)
    assert play(slow, delay_s=0.15)[0].error == ""


def test_the_simulated_executor_is_busy_for_the_watchdog_by_the_simulated_clock() -> None:
    executor = SimulatedExecutor(oracle().infer, 1.0)
    executor.hang_timeout_s = 0.5
    images = {"top": np.zeros((2, 2, 3), np.uint8)}
    executor.submit(lambda: Observation(images, np.zeros(3), "wave", 0.0))
    executor.now_s = 0.5
    assert executor.busy_since_s is None
    executor.now_s = 0.52
    since_s = executor.busy_since_s
    assert since_s is not None
    executor.now_s = 0.9
    assert executor.busy_since_s == since_s
    executor.now_s = 1.0
    assert executor.busy_since_s is None


def test_an_instruction_that_the_node_would_refuse_is_no_episode(robot: RobotConfig) -> None:
    short = replace(robot, parameters=replace(robot.parameters, max_instruction_chars=5))
    with pytest.raises(SetupError, match="23 characters, shorten it to 5"):
        play(short)


def test_limits_of_a_urdf_are_asked_for_by_both(robot: RobotConfig, tmp_path: Path) -> None:
    urdf = replace(robot, limits=replace(robot.limits, source="urdf"))
    with pytest.raises(RobotConfigError, match="--urdf FILE"):
        ClosedLoop(Far(), urdf, Settings())
    with pytest.raises(RobotConfigError, match="--urdf FILE"):
        run(write_bag(tmp_path / "bag", 0.4), with_params(tmp_path, "limits: {source: urdf}"),
            oracle=oracle())  # fmt: skip


def with_params(folder: Path, *lines: str) -> Plan:
    plan = make_plan(folder, control_every=0)
    Path(str(plan.params_file)).write_text(PARAMS + "".join(f"    {line}\n" for line in lines))
    return plan


def far() -> FormulaPolicy:
    """A radian beside what is recorded."""

    def predict(observation: Observation, times_s: FloatArray) -> FloatArray:
        return motion(times_s) + np.array([1.0, 0.0, 0.0])

    return FormulaPolicy("far", predict)


def test_a_far_first_command_is_refused_over_a_recording(tmp_path: Path) -> None:
    plan = with_params(tmp_path, "faults: {first_command: refuse}")
    result = run(write_bag(tmp_path / "bag", 1.5), plan, far=far(), oracle=oracle())
    ticks = {name: p.schedulers["latest"].ticks for name, p in result.policies.items()}
    assert ticks["far"] == 0 < ticks["oracle"]
    assert any(text.startswith("far, latest: ") and "away" in text for text in notes(result))


def test_failures_in_a_row_end_the_motion_over_a_recording(tmp_path: Path) -> None:
    policy = oracle()
    infer = policy.infer

    def failing(observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        if observation.stamp_s > 102.0:
            raise RuntimeError("broken")
        return infer(observation, prefix)

    policy.infer = failing  # type: ignore[method-assign]
    plan = with_params(tmp_path, "faults: {max_failures: 2}")
    result = run(write_bag(tmp_path / "bag", 4.0), plan, it=policy)
    (text,) = [text for text in notes(result) if "the motion ends" in text]
    assert text.startswith("it, latest: 2 inferences failed in a row")
    assert 90 < result.policies["it"].schedulers["latest"].ticks < 150


def test_a_long_instruction_is_refused_over_a_recording(tmp_path: Path) -> None:
    plan = with_params(tmp_path, "max_instruction_chars: 3")
    result = run(write_bag(tmp_path / "bag", 0.5), plan, it=oracle())
    assert result.episodes == []
    assert any("instruction refused" in text for text in notes(result))


def test_after_a_pause_of_a_recording_every_runner_moves_again(tmp_path: Path) -> None:
    """Fault: the runners had one buffer, and each of them emptied it at the jump of the clock."""

    def cut(topic: str, k: int, message: Any) -> Any:
        # the instruction is repeated every second, the rest comes at 50 Hz
        missing = 1 <= k < 9 if topic == "/instruction" else 50 <= k < 400
        return None if missing else message

    bag = rewrite(write_bag(tmp_path / "bag", 9.0), tmp_path / "pause", cut)
    plan = make_plan(tmp_path, control_every=0, schedulers=("latest", "blend", "sync"))
    result = run(bag, plan, oracle=oracle())
    players = result.policies["oracle"].schedulers
    # two stretches of 1 s, each without the first observation's delay, the second also without
    # the rest that the tail of the first takes
    ticks = {name: players[name].ticks for name in ("latest", "blend", "sync")}
    assert all(60 < count <= 100 for count in ticks.values()), ticks
    assert any("the clock went" in text for text in notes(result))


def test_there_is_one_factory() -> None:
    """A second one would drift from the node's again."""
    for module in (closed_loop, scheduler_replay):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert "evaluation_runner(" in source
        for part in ("MotionLimiter", "CommandStream", "LowPassFilter", "PolicyRunner("):
            assert part not in source
