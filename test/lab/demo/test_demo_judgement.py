"""The demo's judgement of the arms' motion, from recorded states."""

from __future__ import annotations

import numpy as np

from pi05_lab.demo.report import DemoRecord, judge_run
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.experts import Expert
from pi05_lab.sim.tasks import Task, parse

TICK_S = 0.02


def run(*instructions: tuple[str, float], obey: str) -> DemoRecord:
    """States of a robot that follows the instruction `obey`, whatever the instructions are."""
    sim = SimulatedAloha()
    sim.reset(3)
    expert = Expert(sim)
    task = parse(obey)
    assert task is not None
    record = DemoRecord(joint_names=[])
    now_s = 50.0
    for text, seconds in instructions:
        record.instructions.append((now_s, text))
        for tick in range(round(seconds / TICK_S)):
            if tick % 10 == 0:
                plan = expert.plan(task)
            sim.set_targets(plan[tick % 10])
            sim.step(4)
            now_s += TICK_S
            record.qpos_s.append(now_s)
            record.qpos.append(sim.qpos().tolist())
    return record


def test_a_done_task_is_done() -> None:
    red = "touch the red cube with the left arm"
    [outcome] = judge_run(run((red, 4.0), obey=red))
    assert outcome.known
    assert outcome.done_after_s is not None
    assert 0.5 < outcome.done_after_s < 3.0
    assert not outcome.wrong
    assert str(outcome).startswith("done after")


def test_another_cube_does_not_count() -> None:
    """Fault pinned: any touched cube counts as the named one."""
    asked, obeyed = "touch the blue cube with the left arm", "touch the red cube with the left arm"
    [outcome] = judge_run(run((asked, 4.0), obey=obeyed))
    assert outcome.done_after_s is None
    assert outcome.wrong
    assert "not done in 4.0 s, after another cube or arm" in str(outcome)


def test_each_instruction_has_its_own_time() -> None:
    red = "touch the red cube with the left arm"
    first, second = judge_run(run(("dance", 0.4), (red, 4.0), obey=red))
    assert not first.known
    assert str(first) == "no task that can be judged"
    assert second.done_after_s is not None
    assert np.isclose(first.given_s, 0.4, atol=0.05)
    assert Task("touch", "left", "red") == parse(second.text)


def test_a_changed_instruction_is_reported() -> None:
    red, blue = "touch the red cube with the left arm", "touch the blue cube with the right arm"
    first, _ = judge_run(run((blue, 0.6), (red, 1.0), obey=red))
    assert str(first) == "not done when changed after 0.6 s"


def test_a_run_without_states_has_no_outcomes() -> None:
    assert judge_run(DemoRecord(joint_names=[], instructions=[(1.0, "go home")])) == []
