"""Faults pinned: steps counted from the arrival, late steps executed, averaged grippers, averages
outside of what was predicted, drops without a reason; two plans averaged into one, a jump or a stop
at the change between them, a change that never ends or never begins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.control.scheduler import SCHEDULERS, Guard, make_scheduler
from pi05_ros.types import ActionChunk, FloatArray

settings = hypothesis_settings(max_examples=60, deadline=None)
OVERLAPPING = ("latest", "temporal_ensemble")
GRIPPER = [False, False, True]
EPOCH_S = 1.76e9
values = st.floats(-10, 10)
decays = st.floats(-1e4, 1e4) | st.sampled_from([0.0, 0.01])


def chunk(
    actions: FloatArray | list[list[float]], stamp_s: float = 0.0, dt_s: float = 0.02
) -> ActionChunk:
    return ActionChunk(np.asarray(actions, dtype=np.float64), stamp_s, dt_s)


def constant(value: float, stamp_s: float = 0.0, horizon: int = 10) -> ActionChunk:
    return chunk(np.full((horizon, 3), value), stamp_s)


def targets(scheduler: ChunkScheduler, times_s: ArrayLike) -> FloatArray:
    result = scheduler.targets(np.asarray(times_s, dtype=np.float64))
    assert result is not None
    return result


@st.composite
def chunks(draw: st.DrawFn, start_s: float = 0.0, spread_s: float = 0.3) -> list[ActionChunk]:
    """Overlapping chunks of different horizons and steps, oldest first."""
    stamps = draw(st.lists(st.integers(0, int(spread_s * 1000)), min_size=1, max_size=6))
    result = []
    for stamp in sorted(set(stamps)):
        horizon = draw(st.integers(20, 40))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        actions = rng.normal(size=(horizon, 3)) * draw(st.sampled_from([0.0, 1.0, 100.0]))
        result.append(chunk(actions, start_s + stamp / 1000, draw(st.sampled_from([0.02, 1 / 30]))))
    return result


def interpolated(c: ActionChunk, times_s: FloatArray) -> FloatArray:
    steps = c.stamp_s + c.dt_s * np.arange(c.horizon)
    return np.stack([np.interp(times_s, steps, column) for column in c.actions.T], axis=-1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_before_the_first_chunk_and_after_clear(name: str) -> None:
    scheduler = make_scheduler(name, gripper=GRIPPER)
    for _ in range(2):
        assert scheduler.targets(np.zeros(4)) is None
        assert scheduler.remaining_s(0.0) == 0
        assert scheduler.live_chunks(0.0) == 0
        assert scheduler.wants_inference(0.0)
        assert scheduler.add(constant(1.0), 0.0)
        scheduler.clear()


@settings
@given(st.sampled_from(SCHEDULERS), decays, st.integers(1, 60), st.sampled_from([0.0, EPOCH_S]))
def test_one_chunk_alone_comes_back_unchanged(
    name: str, m: float, horizon: int, start_s: float
) -> None:
    actions = np.random.default_rng(horizon).normal(size=(horizon, 3))
    scheduler = make_scheduler(name, gripper=GRIPPER, m=m)
    assert scheduler.add(chunk(actions, start_s), start_s)
    # seconds since 1970 resolve 0.24 µs: so much of the way to the next step is not seen
    atol = 1e-6 / 0.02 * np.ptp(actions)
    np.testing.assert_allclose(
        targets(scheduler, start_s + 0.02 * np.arange(horizon)), actions, rtol=0, atol=atol
    )


@settings
@given(decays, st.lists(st.integers(0, 20), min_size=2, max_size=8, unique=True))
def test_equal_chunks_come_back_unchanged_for_any_weights(m: float, starts: list[int]) -> None:
    plan = np.random.default_rng(0).normal(size=(60, 3))
    scheduler = make_scheduler("temporal_ensemble", gripper=GRIPPER, m=m)
    for start in sorted(starts):
        assert scheduler.add(chunk(plan[start : start + 40], start * 0.02), start * 0.02)
    assert scheduler.live_chunks(max(starts) * 0.02) == len(starts)
    steps = np.arange(max(starts), max(starts) + 40)
    np.testing.assert_allclose(targets(scheduler, steps * 0.02), plan[steps], atol=1e-12)


@settings
@given(st.sampled_from(OVERLAPPING), decays, chunks(), st.floats(0.3, 2.0))
def test_result_stays_in_the_hull_of_the_live_predictions(
    name: str, m: float, live: list[ActionChunk], time_s: float
) -> None:
    scheduler = make_scheduler(name, gripper=[False] * 3, m=m)
    for c in live:
        assert scheduler.add(c, c.stamp_s)
    times = np.linspace(time_s, time_s + 0.22, 12)
    result = targets(scheduler, times)
    predictions = np.stack([interpolated(c, times) for c in live])
    assert np.isfinite(result).all()
    assert (result >= predictions.min(axis=0) - 1e-9).all()
    assert (result <= predictions.max(axis=0) + 1e-9).all()


@settings
@given(decays, chunks())
def test_grippers_are_the_newest_chunks(m: float, live: list[ActionChunk]) -> None:
    scheduler = make_scheduler("temporal_ensemble", gripper=GRIPPER, m=m)
    for c in live:
        scheduler.add(c, c.stamp_s)
    newest = live[-1]
    times = newest.stamp_s + newest.dt_s * np.arange(newest.horizon)
    np.testing.assert_allclose(targets(scheduler, times)[:, 2], newest.actions[:, 2], atol=1e-3)


@settings
@given(st.sampled_from(OVERLAPPING), st.floats(0, 0.19), st.booleans())
def test_late_steps_never_come_back(name: str, delay_s: float, after_another: bool) -> None:
    """Every step whose time was over on arrival is poisoned; the one that leads to now is not."""
    scheduler = make_scheduler(name, gripper=GRIPPER)
    if after_another:
        scheduler.add(constant(1.0, stamp_s=-0.1), -0.1)
    actions = np.full((11, 3), 1.0)
    actions[: max(0, math.floor(delay_s / 0.02 - 1e-6))] = 1e6
    assert scheduler.add(chunk(actions), delay_s)
    np.testing.assert_allclose(targets(scheduler, delay_s + np.linspace(0, 1, 100)), 1.0)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_steps_belong_to_the_observations_stamp(name: str) -> None:
    scheduler = make_scheduler(name, gripper=GRIPPER)
    actions = np.arange(30.0).reshape(10, 3)
    scheduler.add(chunk(actions, stamp_s=5.0), now_s=5.1)
    np.testing.assert_allclose(targets(scheduler, [5.1, 5.13])[:, 0], [15.0, 19.5])
    assert scheduler.remaining_s(5.1) == pytest.approx(0.08)


def test_sync_executes_a_chunk_as_a_whole_from_its_arrival() -> None:
    scheduler = make_scheduler("sync", gripper=GRIPPER)
    actions = np.arange(30.0).reshape(10, 3)
    assert scheduler.add(chunk(actions, stamp_s=5.0), now_s=7.0)
    np.testing.assert_allclose(targets(scheduler, 7.0 + 0.02 * np.arange(10)), actions)
    assert scheduler.remaining_s(7.0) == pytest.approx(0.18)
    assert not scheduler.wants_inference(7.17)
    assert not scheduler.add(constant(1.0, stamp_s=7.1), now_s=7.1)
    assert scheduler.statistics.dropped_busy == 1
    assert scheduler.wants_inference(7.18)
    np.testing.assert_allclose(targets(scheduler, [9.0]), actions[-1:])
    assert scheduler.add(constant(-1.0, stamp_s=7.18), now_s=9.0)
    np.testing.assert_allclose(targets(scheduler, [9.0, 9.5]), -1.0)


def test_latest_swaps_to_the_newest_chunk() -> None:
    scheduler = make_scheduler("latest", gripper=GRIPPER)
    scheduler.add(constant(1.0, 0.0, horizon=50), 0.0)
    scheduler.add(constant(2.0, 0.1), 0.1)
    np.testing.assert_allclose(targets(scheduler, [0.1, 0.28, 0.9]), 2.0)
    assert scheduler.live_chunks(0.1) == 1


def test_ensemble_weights_are_acts() -> None:
    """w_i = exp(-m·i), i = 0 the oldest of those that reach the time."""
    scheduler = make_scheduler("temporal_ensemble", gripper=GRIPPER, m=0.5)
    scheduler.add(constant(1.0, 0.0, horizon=6), 0.0)
    scheduler.add(constant(10.0, 0.02), 0.02)
    scheduler.add(constant(100.0, 0.04), 0.04)
    w = np.exp([0.0, -0.5, -1.0])
    all_three = w @ [1.0, 10.0, 100.0] / w.sum()
    without_the_first = w[:2] @ [10.0, 100.0] / w[:2].sum()
    np.testing.assert_allclose(
        targets(scheduler, [0.1, 0.12, 0.21, 9.0])[:, :2],
        np.repeat([[all_three], [without_the_first], [100.0], [100.0]], 2, axis=1),
    )


def test_ensemble_weights_skip_a_chunk_that_does_not_reach_the_time() -> None:
    scheduler = make_scheduler("temporal_ensemble", gripper=GRIPPER, m=0.5)
    scheduler.add(constant(1.0, 0.0, horizon=20), 0.0)
    scheduler.add(constant(10.0, 0.02, horizon=3), 0.02)
    scheduler.add(constant(100.0, 0.04, horizon=20), 0.04)
    w = np.exp([0.0, -0.5])
    np.testing.assert_allclose(targets(scheduler, [0.2])[0, 0], w @ [1.0, 100.0] / w.sum())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_last_action_is_held_beyond_the_horizon(name: str) -> None:
    scheduler = make_scheduler(name, gripper=GRIPPER)
    actions = np.arange(30.0).reshape(10, 3)
    scheduler.add(chunk(actions), 0.0)
    np.testing.assert_array_equal(
        targets(scheduler, [0.18, 0.19, 100.0]), np.repeat(actions[-1:], 3, axis=0)
    )
    assert scheduler.remaining_s(0.19) == 0
    assert scheduler.live_chunks(0.19) == 0


@pytest.mark.parametrize("name", OVERLAPPING)
def test_useless_chunks_are_dropped_and_counted_with_the_reason(name: str) -> None:
    scheduler = make_scheduler(name, gripper=GRIPPER)
    assert scheduler.add(constant(1.0, 1.0), 1.18)
    assert not scheduler.add(constant(2.0, 1.1), 1.29)
    assert not scheduler.add(constant(3.0, 0.9), 1.0)
    assert not scheduler.add(constant(4.0, 1.0), 1.0)
    statistics = scheduler.statistics
    assert (statistics.received, statistics.used) == (4, 1)
    assert (statistics.dropped_late, statistics.dropped_old) == (1, 2)
    np.testing.assert_allclose(targets(scheduler, [1.2]), 1.0)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_inference_keeps_the_replan_interval(name: str) -> None:
    scheduler = make_scheduler(name, gripper=GRIPPER, replan_interval_s=0.1)
    scheduler.add(constant(1.0, EPOCH_S), EPOCH_S + 0.08)
    assert not scheduler.wants_inference(EPOCH_S + 0.09)
    assert scheduler.wants_inference(EPOCH_S + 0.1)
    eager = make_scheduler(name, gripper=GRIPPER)
    eager.add(constant(1.0), 0.08)
    assert eager.wants_inference(0.0)


def test_ensemble_is_bounded() -> None:
    """Neither expired chunks nor a policy much faster than its horizon make it grow."""
    scheduler = make_scheduler("temporal_ensemble", gripper=GRIPPER, m=0.0, max_chunks=4)
    for i in range(20):
        scheduler.add(constant(float(i), i * 0.001), i * 0.001)
    assert scheduler.live_chunks(0.02) == 4
    np.testing.assert_allclose(targets(scheduler, [0.05])[0, 0], np.mean([16, 17, 18, 19]))
    scheduler.add(constant(5.0, 10.0), 10.0)
    assert scheduler.live_chunks(0.0) == 1
    np.testing.assert_allclose(targets(scheduler, [9.0, 10.1]), 5.0)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (chunk([[0.0, math.nan, 0.0]]), "step 0, joint 1"),
        (chunk([[0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]]), "step 1, joint 2"),
        (chunk(np.zeros((5, 4))), r"\[horizon, 3\]"),
        (chunk(np.zeros((0, 3))), r"\[horizon, 3\]"),
        (chunk(np.zeros(3)), r"\[horizon, 3\]"),
        (chunk(np.zeros((5, 3)), dt_s=0.0), "dt_s"),
        (chunk(np.zeros((5, 3)), stamp_s=math.nan), "stamp"),
    ],
)
def test_a_malformed_chunk_is_refused_and_leaves_no_trace(
    name: str, bad: ActionChunk, message: str
) -> None:
    scheduler = make_scheduler(name, gripper=GRIPPER)
    scheduler.add(constant(1.0), 0.0)
    with pytest.raises(ValueError, match=message):
        scheduler.add(bad, 0.1)
    assert scheduler.statistics.received == 1
    np.testing.assert_allclose(targets(scheduler, [0.1]), 1.0)


def test_a_chunk_changed_after_it_was_added_does_not_move_the_robot() -> None:
    scheduler = make_scheduler("latest", gripper=GRIPPER)
    c = constant(1.0)
    scheduler.add(c, 0.0)
    c.actions[:] = 99.0
    np.testing.assert_allclose(targets(scheduler, [0.1]), 1.0)


def test_unknown_names_and_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="sync, latest, blend, temporal_ensemble, rtc"):
        make_scheduler("newest", gripper=GRIPPER)
    with pytest.raises(ValueError, match="m must be finite"):
        make_scheduler("temporal_ensemble", gripper=GRIPPER, m=math.nan)
    with pytest.raises(ValueError, match="max_chunks"):
        make_scheduler("temporal_ensemble", gripper=GRIPPER, max_chunks=0)
    with pytest.raises(ValueError, match="replan_interval_s"):
        make_scheduler("latest", gripper=GRIPPER, replan_interval_s=-1.0)
    with pytest.raises(ValueError, match="gripper"):
        make_scheduler("latest", gripper=[])


CROSSOVER_S = 0.2


def plan(value: float, stamp_s: float, gripper: float = 0.0) -> ActionChunk:
    return ActionChunk(np.tile([value, gripper], (50, 1)), stamp_s, 0.02)


def ensemble(confirmations: int = 1, disagreement: float = 0.3) -> ChunkScheduler:
    guard = Guard(disagreement, CROSSOVER_S, confirmations)
    return make_scheduler("temporal_ensemble", gripper=[False, True], m=0.0, guard=guard)


def test_the_guard_prevents_the_average_of_two_plans() -> None:
    """Left at -1, right at +1: the mean leads into the obstacle between them."""
    unguarded = ensemble(disagreement=0.0)
    guarded = ensemble()
    for s in (unguarded, guarded):
        assert s.add(plan(-1.0, 0.0), 0.0) and s.add(plan(1.0, 0.1), 0.1)
    assert targets(unguarded, [0.5])[0, 0] == pytest.approx(0.0)
    assert targets(guarded, [0.5])[0, 0] == pytest.approx(1.0)
    assert guarded.statistics.crossovers == 1


def test_the_crossover_is_continuous_and_bounded() -> None:
    s = ensemble()
    s.add(plan(-1.0, 0.0), 0.0)
    s.add(plan(1.0, 0.1), 0.1)
    times_s = np.arange(0.1, 0.4, 0.001)
    trajectory = targets(s, times_s)[:, 0]
    assert trajectory[0] == pytest.approx(-1.0)
    np.testing.assert_allclose(trajectory[times_s >= 0.1 + CROSSOVER_S], 1.0, atol=1e-9)
    slopes = np.diff(trajectory)
    assert (slopes >= -1e-9).all() and np.abs(np.diff(slopes)).max() < 0.002


def test_another_change_during_the_crossover_is_continuous_too() -> None:
    s = ensemble()
    s.add(plan(-1.0, 0.0), 0.0)
    s.add(plan(1.0, 0.1), 0.1)
    before = targets(s, [0.18])[0, 0]
    s.add(plan(-1.0, 0.18), 0.18)
    assert targets(s, [0.18])[0, 0] == pytest.approx(before, abs=1e-3)
    assert targets(s, [0.18 + CROSSOVER_S])[0, 0] == pytest.approx(-1.0)


def test_grippers_cross_over_at_once() -> None:
    s = ensemble()
    s.add(plan(-1.0, 0.0, gripper=0.0), 0.0)
    s.add(plan(1.0, 0.1, gripper=1.0), 0.1)
    assert targets(s, [0.1])[0, 1] == 1.0


def test_a_single_other_plan_is_dropped_and_two_in_a_row_are_followed() -> None:
    """A policy that alternates between two plans keeps the first."""
    s = ensemble(confirmations=2)
    s.add(plan(-1.0, 0.0), 0.0)
    assert not s.add(plan(1.0, 0.1), 0.1)
    assert s.add(plan(-1.0, 0.2), 0.2)
    assert not s.add(plan(1.0, 0.3), 0.3)
    assert targets(s, [0.6])[0, 0] == pytest.approx(-1.0)
    assert s.add(plan(1.0, 0.4), 0.4)
    assert targets(s, [0.4 + CROSSOVER_S])[0, 0] == pytest.approx(1.0)
    statistics = s.statistics
    assert (statistics.received, statistics.used) == (5, 3)
    assert (statistics.dropped_doubted, statistics.crossovers) == (2, 1)


def test_another_plan_is_followed_at_once_when_the_old_one_ends() -> None:
    """Pins: doubt that lets the horizon run out."""
    s = ensemble(confirmations=10)
    s.add(plan(-1.0, 0.0), 0.0)
    assert s.add(plan(1.0, 0.9), 0.9)


def test_chunks_that_agree_are_averaged() -> None:
    s = ensemble()
    s.add(plan(0.0, 0.0), 0.0)
    s.add(plan(0.2, 0.1), 0.1)
    assert targets(s, [0.5])[0, 0] == pytest.approx(0.1)


def test_a_gripper_that_opens_is_not_another_plan() -> None:
    s = ensemble()
    s.add(plan(0.0, 0.0, gripper=0.0), 0.0)
    s.add(plan(0.0, 0.1, gripper=5.0), 0.1)
    assert s.statistics.crossovers == 0


def test_newest_first_counts_from_the_other_end() -> None:
    weights = np.exp([-1.0, -0.5, 0.0])
    s = make_scheduler("temporal_ensemble", gripper=[False, True], m=0.5, newest_first=True)
    for stamp_s, value in ((0.0, 1.0), (0.02, 10.0), (0.04, 100.0)):
        s.add(plan(value, stamp_s), stamp_s)
    expected = weights @ [1.0, 10.0, 100.0] / weights.sum()
    assert targets(s, [0.5])[0, 0] == pytest.approx(expected)
    # the oldest does not reach 1.0 s
    expected = weights[1:] @ [10.0, 100.0] / weights[1:].sum()
    assert targets(s, [1.0])[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "bad", [{"disagreement": -1.0}, {"crossover_s": 0.0}, {"confirmations": 0}]
)
def test_bad_guards_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Guard(**bad)  # type: ignore[arg-type]
