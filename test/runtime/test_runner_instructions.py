"""Instructions that change faster than the policy infers.

Fault pinned: 46 alternating instructions a second end all inference, and no problem says so.
"""

from __future__ import annotations

import threading
import time

import numpy as np
from runner_rig import Rig  # type: ignore[import-not-found]

from pi05_ros.executor import ExecutorState
from pi05_ros.runner import InstructionChanges


def instruction_problems(rig: Rig) -> list[str]:
    return [p for p in rig.problems() if p.startswith("instruction: ")]


def let_finish(rig: Rig, gate: threading.Event) -> None:
    """Let the inference in flight finish; the next one waits again."""
    rig.policy.gate = threading.Event()
    gate.set()
    deadline_s = time.monotonic() + 10.0
    while rig.executor.state is not ExecutorState.READY:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_instructions_faster_than_inference_are_a_problem_and_not_followed(rig: Rig) -> None:
    rig.start("left")
    for _ in range(60):
        rig.tick()
    gate = rig.policy.gate = threading.Event()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    instructions = [("left", "right")[k % 2] for k in range(9)]
    chunks = []
    for k, instruction in enumerate(instructions):
        rig.runner.set_instruction(instruction)
        chunks += rig.tick().chunks
        if k % 3 == 2:  # an inference ends for every third instruction
            let_finish(rig, gate)
            gate = rig.policy.gate
            rig.until(lambda _: rig.executor.busy_since_s is not None)
    assert chunks == []
    (problem,) = instruction_problems(rig)
    assert "changes in 0." in problem and "no instruction is followed; publish it once" in problem
    rest = rig.until(
        lambda tick: tick.trajectory is not None and np.allclose(tick.trajectory.velocities, 0)
    )
    assert rest.trajectory is not None
    gate = rig.policy.gate
    rig.policy.gate = None
    gate.set()
    tick = rig.until(lambda tick: tick.chunks)
    assert {chunk.instruction for chunk, _ in tick.chunks} == {instructions[-1]}
    assert instruction_problems(rig) == []


def test_instructions_that_are_followed_are_no_problem(rig: Rig) -> None:
    rig.start("left")
    for k in range(6):
        instruction = ("right", "left")[k % 2]
        rig.runner.set_instruction(instruction)
        rig.until(
            lambda tick, wanted=instruction: any(c.instruction == wanted for c, _ in tick.chunks)
        )
        assert instruction_problems(rig) == []


def test_changes_while_nothing_is_inferred_are_no_problem(rig: Rig) -> None:
    """A person who types three instructions while a camera is missing."""
    rig.start("left")
    rig.until(lambda _: rig.executor.state is ExecutorState.READY, see=False)
    for k in range(6):
        rig.runner.set_instruction(("right", "left")[k % 2])
        rig.tick(see=False)
    assert instruction_problems(rig) == []


def test_instructions_before_activation_are_no_problem(rig: Rig) -> None:
    for k in range(6):
        rig.runner.set_instruction(("right", "left")[k % 2])
    rig.runner.activate()
    assert instruction_problems(rig) == []


def test_blended_instructions_lose_no_inference(rig: Rig) -> None:
    rig.runner = rig.make_runner(blend_instructions=True)
    rig.start("left")
    gate = rig.policy.gate = threading.Event()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    for k in range(6):
        rig.runner.set_instruction(("right", "left")[k % 2])
        rig.tick()
    assert instruction_problems(rig) == []
    rig.policy.gate = None
    gate.set()
    assert rig.until(lambda tick: tick.chunks)


def test_the_problem_has_count_and_time_of_the_changes() -> None:
    changes = InstructionChanges()
    for k in range(5):
        changes.record_discard(100.0 + 0.05 * k)
        assert (changes.problem(100.0 + 0.05 * k, 0.16) != "") == (k >= 2)
    assert changes.problem(100.2, 0.16) == (
        "instruction: 5 changes in 0.2 s, an inference takes 0.16 s: no instruction is followed; "
        "publish it once"
    )
    assert "5 changes in 0.2 s: no instruction" in changes.problem(100.2, None)
    # long ago: what prevents inference then is another problem
    assert changes.problem(110.0, 0.16) == ""
    changes.clear()
    assert changes.problem(100.2, 0.16) == ""
