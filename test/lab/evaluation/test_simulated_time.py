"""Faults pinned: a chunk usable before its delay, a policy's exception that ends the run."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_lab.evaluation.simulated_executor import SimulatedExecutor
from pi05_ros.executor import ExecutorState
from pi05_ros.types import ActionChunk, ActionPrefix, Observation


class Still:
    horizon, dt_s, state_dim, action_dim = 5, 0.02, 2, 2
    cameras = ("cam_high",)
    description = "holds its position"
    fault: Exception | None = None

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        if self.fault is not None:
            raise self.fault
        return ActionChunk(np.zeros((5, 2)), observation.stamp_s, self.dt_s)


def seen_at(stamp_s: float) -> Observation:
    return Observation({}, np.zeros(2), "wave", stamp_s)


def test_a_chunk_comes_when_its_delay_is_over_and_once() -> None:
    executor = SimulatedExecutor(Still().infer, 0.16)
    executor.now_s = 1.0
    executor.submit(lambda: seen_at(0.99))
    executor.now_s = 1.14
    assert executor.state is ExecutorState.BUSY and executor.results() == []
    executor.now_s = 0.99 + 0.16
    assert executor.state is ExecutorState.READY
    (result,) = executor.results()
    assert result.chunk is not None and result.stamp_s == 0.99
    assert executor.results() == [] and executor.completed == 1


def test_discarding_takes_the_chunk_but_not_the_time() -> None:
    executor = SimulatedExecutor(Still().infer, 0.16)
    executor.submit(lambda: seen_at(0.0))
    executor.discard()
    assert executor.state is ExecutorState.BUSY
    executor.now_s = 0.2
    assert executor.state is ExecutorState.READY and executor.results() == []


def test_a_fault_of_the_policy_is_a_failed_result() -> None:
    policy = Still()
    policy.fault = RuntimeError("broken\npolicy")
    executor = SimulatedExecutor(policy.infer, 0.0)
    executor.submit(lambda: seen_at(0.0))
    (result,) = executor.results()
    assert result.chunk is None and result.error == "RuntimeError: broken policy"
    assert executor.failed == 1


@pytest.mark.parametrize("delay_s", [-0.1, float("nan")])
def test_an_impossible_delay_is_refused(delay_s: float) -> None:
    with pytest.raises(ValueError, match="delay"):
        SimulatedExecutor(Still().infer, delay_s)
