"""Pins: noise that depends on the episodes before, and an expert that plans from another moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi05_ros.evaluation.agents import ExpertAgent, make_agent
from pi05_ros.evaluation.closed_loop import ClosedLoop, Settings
from pi05_ros.evaluation.robot_config import read_robot_config
from pi05_ros.evaluation.trials import plan_trials
from pi05_ros.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_ros.sim.experts import Expert, grippers_to_metres, grippers_to_unit
from pi05_ros.sim.tasks import Task
from pi05_ros.types import Observation

ALOHA = Path(__file__).parents[2] / "config" / "aloha.yaml"


def observe(instruction: str) -> Observation:
    return Observation({}, grippers_to_unit(HOME_POSITIONS), instruction, 3.0)


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


def test_the_expert_refuses_what_is_no_task() -> None:
    with pytest.raises(ValueError, match="make coffee"):
        ExpertAgent().infer(observe("make coffee"))
