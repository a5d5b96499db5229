"""Faults pinned: memory of the network before that stays on the GPU, an instruction that is looked
at by the buffer alone, guided sampling that compiles in motion, joints in another order."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pi05_ros.config import (
    CameraParameters,
    GuidanceParameters,
    ParameterError,
    PolicyParameters,
    SchedulerParameters,
)
from pi05_ros.nodes.assembly import (
    check_fit,
    empty_device_cache,
    load_policy,
    make_executor,
    release_device_memory,
    usable_instruction,
    warmup_prefixes,
)
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import ActionChunk, ActionPrefix, JointGroup, JointSpec, Observation


class FullPolicy:
    """Out of memory in its third inference."""

    horizon, dt_s, state_dim, action_dim = 4, 0.02, 2, 2
    cameras, description = ("high",), "a fake"

    def __init__(self) -> None:
        self.calls: list[ActionPrefix | None] = []

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self.calls.append(prefix)
        if prefix is None and len([call for call in self.calls if call is None]) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ActionChunk(np.zeros((4, 2)), observation.stamp_s, self.dt_s)

    def check_instruction(self, instruction: str) -> None:
        if len(instruction) > 5:
            raise ValueError("the prompt needs 7 tokens, the network takes 5")


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    return calls


@pytest.mark.parametrize("method", ["rtc", "temporal_ensemble"])
def test_the_nodes_executor_warms_up_recovers_and_frees(emptied: list[str], method: str) -> None:
    policy = FullPolicy()
    arrived = threading.Event()
    executor = make_executor(
        PolicyParameters(inference_nice=0),
        SchedulerParameters(method=method),
        lambda: policy,
        arrived.set,
    )
    executor.start()
    executor.wait_ready(10.0)
    assert any(call is not None for call in policy.calls) is (method == "rtc")
    executor.submit(lambda: Observation({}, np.zeros(2), "lift", 1.0))
    assert arrived.wait(10.0)
    assert executor.results()[0].chunk is not None and emptied == ["emptied"]
    assert executor.stop(10.0)
    assert emptied == ["emptied"] * 2


def test_the_head_is_a_parameter() -> None:
    """Fault: a checkpoint with two heads runs with one of them alone."""
    parameters = PolicyParameters(device="cpu", threads=torch.get_num_threads(), head="fast")
    with pytest.raises(CheckpointError, match=r"predicts no action tokens.*use head .flow"):
        load_policy(parameters, GuidanceParameters())


def test_objects_that_configure_froze_are_freed(emptied: list[str]) -> None:
    """Fault: cycles that gc.freeze() hides from every collection."""

    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself = cycle  # type: ignore[attr-defined]
    gone = weakref.ref(cycle)
    gc.freeze()
    del cycle
    gc.collect()
    assert gone() is not None
    release_device_memory()
    assert gone() is None and emptied == ["emptied"]


def test_without_a_gpu_nothing_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("there is no GPU"))
    empty_device_cache()


def test_an_instruction_is_checked_by_rule_and_by_the_policy() -> None:
    assert usable_instruction(FullPolicy(), " lift ", 300) == "lift"
    unchecked: Any = object()
    assert usable_instruction(unchecked, "lift the cube", 300) == "lift the cube"
    with pytest.raises(ValueError, match="needs 7 tokens"):
        usable_instruction(FullPolicy(), "lift the cube", 300)
    with pytest.raises(ValueError, match="shorten it to 3"):
        usable_instruction(FullPolicy(), "lift", 3)


@pytest.mark.parametrize("horizon", [1, 4, 50])
def test_a_warm_up_prefix_fits_any_horizon(horizon: int) -> None:
    policy = FullPolicy()
    policy.horizon = horizon  # type: ignore[misc]
    (prefix,) = warmup_prefixes(policy)
    assert 1 <= len(prefix.actions) <= horizon and prefix.committed_steps <= len(prefix.actions)


def fitting(names: Sequence[str], known: Sequence[str]) -> list[str]:
    policy: Any = SimpleNamespace(
        state_dim=len(names), action_dim=len(names), cameras=("top",), joint_names=tuple(known)
    )
    joints = JointGroup([JointSpec(name, -1.0, 1.0, 1.0, 1.0) for name in names])
    return check_fit(policy, joints, {"top": CameraParameters()})


def test_joints_in_another_order_than_the_policys_are_refused() -> None:
    """Fault: the reversed order is configured, and the wrong joints move."""
    assert fitting(["waist", "elbow", "wrist"], ["waist", "elbow", "wrist"]) == []
    with pytest.raises(ParameterError, match=r"'wrist' is at place 1, .* has it at place 3"):
        fitting(["wrist", "elbow", "waist"], ["waist", "elbow", "wrist"])
    with pytest.raises(ParameterError, match="'elbow' is at place 3"):
        fitting(["a", "b", "elbow"], ["waist", "elbow", "wrist"])


def test_joints_of_other_names_are_a_warning() -> None:
    """Their order cannot be checked; a policy without names has nothing to compare with."""
    (warning,) = fitting(["j1", "elbow", "j3"], ["waist", "elbow", "wrist"])
    assert "j1 is waist, j3 is wrist" in warning
    assert fitting(["j1", "j2"], []) == []
