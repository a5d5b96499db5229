"""Faults pinned: known errors of chunk execution, for every method."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.control.chunks import REPLAN_MODES, Replan
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.scheduler import SCHEDULERS, Guard, make_scheduler
from pi05_ros.control.trajectory import CommandStream
from pi05_ros.types import ActionChunk, FloatArray, JointGroup, JointSpec

DT_S = 0.02
OVERLAPPING = tuple(name for name in SCHEDULERS if name != "sync")


def constant(value: float, stamp_s: float, horizon: int = 50) -> ActionChunk:
    return ActionChunk(np.full((horizon, 1), value), stamp_s, DT_S)


def ramp(stamp_s: float, horizon: int = 50) -> ActionChunk:
    """All chunks have the same action at the same time."""
    return ActionChunk((stamp_s + DT_S * np.arange(float(horizon)))[:, None], stamp_s, DT_S)


def at(scheduler: object, time_s: float) -> float:
    targets = scheduler.targets(np.array([time_s]))  # type: ignore[attr-defined]
    assert targets is not None
    return float(targets[0, 0])


@pytest.mark.parametrize("name", OVERLAPPING)
def test_a_zero_action_is_not_missing(name: str) -> None:
    scheduler = make_scheduler(name, gripper=[False], m=0.0)
    scheduler.add(constant(1.0, 0.0), 0.0)
    scheduler.add(constant(0.0, 0.1), 0.1)
    expected = {"blend": 0.3, "temporal_ensemble": 0.5}.get(name, 0.0)
    assert at(scheduler, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_grippers_are_not_averaged(name: str) -> None:
    scheduler = make_scheduler(name, gripper=[True])
    scheduler.add(constant(0.0, 0.0), 0.0)
    scheduler.add(constant(1.0, 0.1), 0.1)
    assert at(scheduler, 0.5) == 1.0


@pytest.mark.parametrize("name", OVERLAPPING)
def test_steps_belong_to_the_observation_not_to_the_arrival(name: str) -> None:
    scheduler = make_scheduler(name, gripper=[False])
    for stamp_s, late_s in ((0.0, 0.0), (0.2, 0.13), (0.4, 0.31)):
        scheduler.add(ramp(stamp_s), stamp_s + late_s)
    for time_s in (0.71, 0.8, 1.3):
        assert at(scheduler, time_s) == pytest.approx(time_s)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_robot_at_rest_skips_no_steps(name: str) -> None:
    """Pins: a jump at the start of an episode to a later step of the plan."""
    scheduler = make_scheduler(name, gripper=[False])
    scheduler.add(ramp(0.0), 0.3, standing=True)
    assert at(scheduler, 0.3) == pytest.approx(0.0)
    assert at(scheduler, 0.4) == pytest.approx(0.1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_robot_whose_chunks_ran_out_skips_no_steps(name: str) -> None:
    """The robot has held its position since, so the next plan begins there."""
    scheduler = make_scheduler(name, gripper=[False])
    scheduler.add(constant(2.0, 0.0, horizon=10), 0.0)
    later = ActionChunk(2.0 + DT_S * np.arange(50.0)[:, None], 1.0, DT_S)
    scheduler.add(later, 1.3)
    assert at(scheduler, 1.3) == pytest.approx(2.0)
    assert at(scheduler, 1.5) == pytest.approx(2.2)


def test_the_prefix_is_the_executed_targets_without_padding() -> None:
    """Committed are the steps until the chunk takes effect; it ends with the live chunks."""
    scheduler = make_scheduler("rtc", gripper=[False])
    assert scheduler.guided and scheduler.prefix(0.0, 0.1) is None
    scheduler.add(ramp(0.0), 0.1)
    prefix = scheduler.prefix(0.5, 0.5 + 0.13)
    assert prefix is not None
    np.testing.assert_allclose(prefix.actions[:, 0], 0.5 + DT_S * np.arange(25))
    assert prefix.committed_steps == 7
    assert scheduler.prefix(1.1, 1.2) is None
    late = scheduler.prefix(0.9, 2.0)
    assert late is not None and late.committed_steps == len(late.actions) == 5


@pytest.mark.parametrize("mode", REPLAN_MODES)
@pytest.mark.parametrize("latency_s", [0.0, 0.2, 0.4])
def test_the_horizon_never_runs_out_while_inference_keeps_up(mode: str, latency_s: float) -> None:
    """Up to half the horizon: a chunk must last until the next one arrives."""
    scheduler = make_scheduler(
        "latest", gripper=[False], replan=Replan(mode, steps=40, remaining_s=0.1)
    )
    scheduler.add(ramp(0.0), 0.0)
    arrival_s, stamp_s = math.inf, 0.0
    inferences = 0
    for tick in range(500):
        now_s = tick * DT_S
        if now_s >= arrival_s - 1e-9:
            scheduler.add(ramp(stamp_s), now_s)
            arrival_s = math.inf
        if arrival_s == math.inf and scheduler.wants_inference(now_s, latency_s):
            stamp_s, arrival_s = now_s, now_s + latency_s
            inferences += 1
        assert scheduler.remaining_s(now_s) > 0, now_s
    interval_s = {
        "free": max(latency_s, DT_S),
        "steps": min(0.8, 0.94 - latency_s),
        "remaining": 0.98 - latency_s - 0.1,
    }[mode]
    assert inferences == pytest.approx(10 / interval_s, rel=0.15)


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[ActionChunk, float]]:
    """Chunks with any delay, in any order, some lost, as they arrive."""
    count = draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stamps_s = np.cumsum(rng.uniform(0.01, 0.3, count))
    found = []
    for stamp_s in stamps_s:
        if rng.uniform() < 0.2:
            continue
        horizon = int(rng.integers(1, 50))
        actions = rng.uniform(-1, 1, size=(horizon, 2))
        late_s = float(rng.choice([0.0, rng.uniform(0, 0.5), rng.uniform(0, 3.0)]))
        found.append((ActionChunk(actions, float(stamp_s), DT_S), float(stamp_s) + late_s))
    return sorted(found, key=lambda item: item[1])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULERS), arrivals(), st.booleans())
def test_any_sequence_of_chunks_gives_a_finite_target_inside_their_hull(
    name: str, sequence: list[tuple[ActionChunk, float]], guarded: bool
) -> None:
    """Beyond a horizon the target is the last step of a chunk, which is in the hull too."""
    guard = Guard(0.2, 0.1) if guarded else None
    scheduler = make_scheduler(name, gripper=[False, True], guard=guard)
    seen: list[FloatArray] = []
    for chunk, now_s in sequence:
        if scheduler.add(chunk, now_s):
            seen.append(chunk.actions)
        targets = scheduler.targets(now_s + DT_S * np.arange(12, dtype=np.float64))
        assert (targets is None) == (not seen)
        if targets is not None:
            everything = np.concatenate(seen)
            assert np.isfinite(targets).all()
            assert (targets >= everything.min(axis=0) - 1e-9).all()
            assert (targets <= everything.max(axis=0) + 1e-9).all()
    statistics = scheduler.statistics
    dropped = (statistics.dropped_late, statistics.dropped_old, statistics.dropped_busy,
               statistics.dropped_doubted)  # fmt: skip
    assert statistics.received == len(sequence) == statistics.used + sum(dropped)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SCHEDULERS), arrivals())
def test_any_sequence_is_continuous_within_the_limits(
    name: str, sequence: list[tuple[ActionChunk, float]]
) -> None:
    """The published motion keeps its limits at chunk boundaries, for any arrivals."""
    joints = JointGroup([JointSpec("a", -2, 2, 1.5, 8.0), JointSpec("b", -2, 2, 1.5, 8.0)])
    stream = CommandStream(MotionLimiter(joints, DT_S), lookahead_steps=5)
    scheduler = make_scheduler(name, gripper=[False, True], guard=Guard(0.2, 0.1))
    stream.start(np.zeros(2), 0.0)
    positions = []
    pending = list(sequence)
    for tick in range(150):
        now_s = tick * DT_S
        while pending and pending[0][1] <= now_s:
            chunk, _ = pending.pop(0)
            scheduler.add(chunk, now_s)
        stream.tick(now_s, scheduler.targets)
        positions.append(stream.commanded(now_s + DT_S).position)
    speeds = np.diff(np.stack(positions), axis=0) / DT_S
    assert (np.abs(speeds) <= 1.5 + 1e-6).all()
    assert (np.abs(np.diff(speeds, axis=0)) / DT_S <= 8.0 + 1e-6).all()


def test_a_method_changed_in_motion_continues_the_live_chunks() -> None:
    before = make_scheduler("temporal_ensemble", gripper=[False])
    for stamp_s in (0.0, 0.1, 0.2):
        before.add(ramp(stamp_s), stamp_s)
    for name in SCHEDULERS:
        after = make_scheduler(name, gripper=[False])
        after.adopt(before)
        assert at(after, 0.5) == pytest.approx(0.5)
        assert after.statistics is before.statistics
        assert not after.add(ramp(0.15), 0.3), "older than what was adopted"


def test_blend_is_a_fixed_share_where_both_exist() -> None:
    scheduler = make_scheduler("blend", gripper=[False])
    scheduler.add(constant(0.0, 0.0, horizon=26), 0.0)
    scheduler.add(constant(1.0, 0.2), 0.2)
    assert at(scheduler, 0.4) == pytest.approx(0.7)
    assert at(scheduler, 0.6) == pytest.approx(1.0)
    scheduler.add(constant(2.0, 0.3), 0.3)
    assert at(scheduler, 0.4) == pytest.approx(0.3 * 0.7 + 0.7 * 2.0)
