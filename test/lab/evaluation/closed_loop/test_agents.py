"""Faults pinned: noise that depends on earlier episodes, an expert with another state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi05_lab.evaluation.closed_loop.agents import ExpertAgent, make_agent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Settings
from pi05_lab.evaluation.closed_loop.trials import plan_trials
from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.experts import Expert, grippers_to_metres, grippers_to_unit
from pi05_lab.sim.tasks import Task
from pi05_ros.cli import main
from pi05_ros.policy.checkpoint import SHIPPED
from pi05_ros.robot_config import read_robot_config
from pi05_ros.types import Observation

ALOHA = Path(__file__).parents[4] / "config" / "aloha.yaml"


def observe(instruction: str) -> Observation:
    return Observation({}, grippers_to_unit(HOME_POSITIONS), instruction, 3.0)


@pytest.mark.slow
def test_the_networks_noise_follows_from_the_trial_alone() -> None:
    agent = make_agent("small", num_steps=1)
    loop = ClosedLoop(agent, read_robot_config(ALOHA), Settings(limit_s=0.3))
    first, second = plan_trials([(Task("touch", "left", "red"), 2)], 0)
    try:
        before = loop.play(second)
        other = loop.play(first)
        assert loop.play(second) == before
    finally:
        agent.close()
    assert before.inferences > 2 and before.failures == 0
    assert before.scenes[-1] != before.scenes[0] and other.scenes[-1] != before.scenes[-1]


def test_a_checkpoint_is_loaded_once_for_all_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: 6.7 GB were read from the disk for every episode of π0.5."""
    from pi05_ros.policy import policy as policy_module

    loads: list[object] = []
    load_model = policy_module.load_model

    def count(*arguments: object) -> object:
        loads.append(arguments)
        return load_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(policy_module, "load_model", count)
    arguments = ["--tasks", "touch", "--per-task", "3", "--limit-s", "0.5", "--num-steps", "1"]
    arguments += ["--size", "32", "24", "--no-pictures", "--output", str(tmp_path)]
    assert main(["sim-eval", *arguments]) == 0
    assert len(loads) == 1


def test_an_evaluation_in_a_training_keeps_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: the rest of a training on a CPU ran on one core."""
    import torch

    from pi05_lab.evaluation.closed_loop import summary as closed_loop_summary

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(closed_loop_summary, "play_trials", lambda make, *_: [make()][1:])
        assert closed_loop_summary.training_figures(SHIPPED) == {}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_expert_plans_from_the_state_that_was_drawn() -> None:
    sim = SimulatedAloha()
    sim.reset(4)
    task = Task("pick", "right", "blue")
    plan = Expert(sim).plan(task)
    agent = ExpertAgent()
    agent.draw("cam_high", sim.qpos())
    chunk = agent.infer(observe("lift up the blue block with your right arm"))
    assert chunk.stamp_s == 3.0 and chunk.actions.shape == (agent.horizon, agent.action_dim)
    assert np.allclose(grippers_to_metres(chunk.actions), plan, atol=1e-6)


def test_the_expert_refuses_an_unknown_instruction() -> None:
    with pytest.raises(ValueError, match="make coffee"):
        ExpertAgent().infer(observe("make coffee"))
