"""The guard. Faults pinned: two plans averaged into one that nobody asked for, a jump or a stop at
the change between them, a change that never ends or is never made."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_ros.control.scheduler import Guard, TemporalEnsembleScheduler
from pi05_ros.types import ActionChunk, FloatArray

DT_S = 0.02
CROSSOVER_S = 0.2


def chunk(value: float, stamp_s: float, gripper: float = 0.0) -> ActionChunk:
    return ActionChunk(np.tile([value, gripper], (50, 1)), stamp_s, DT_S)


def scheduler(confirmations: int = 1, disagreement: float = 0.3) -> TemporalEnsembleScheduler:
    guard = Guard(disagreement, CROSSOVER_S, confirmations)
    return TemporalEnsembleScheduler([False, True], m=0.0, guard=guard)


def at(s: TemporalEnsembleScheduler, *times_s: float) -> FloatArray:
    targets = s.targets(np.array(times_s))
    assert targets is not None
    return targets


def test_trap_averaging_two_modes_gives_a_command_that_no_chunk_asked_for() -> None:
    """Left at -1, right at +1: the mean leads into the obstacle between them."""
    unguarded = scheduler(disagreement=0.0)
    guarded = scheduler()
    for s in (unguarded, guarded):
        assert s.add(chunk(-1.0, 0.0), 0.0) and s.add(chunk(1.0, 0.1), 0.1)
    assert at(unguarded, 0.5)[0, 0] == pytest.approx(0.0)
    assert at(guarded, 0.5)[0, 0] == pytest.approx(1.0)
    assert guarded.statistics.crossovers == 1


def test_the_crossover_is_continuous_and_bounded() -> None:
    s = scheduler()
    s.add(chunk(-1.0, 0.0), 0.0)
    s.add(chunk(1.0, 0.1), 0.1)
    times_s = np.arange(0.1, 0.4, 0.001)
    course = at(s, *times_s)[:, 0]
    assert course[0] == pytest.approx(-1.0)
    np.testing.assert_allclose(course[times_s >= 0.1 + CROSSOVER_S], 1.0, atol=1e-9)
    slopes = np.diff(course)
    assert (slopes >= -1e-9).all() and np.abs(np.diff(slopes)).max() < 0.002


def test_another_change_during_the_crossover_is_continuous_too() -> None:
    s = scheduler()
    s.add(chunk(-1.0, 0.0), 0.0)
    s.add(chunk(1.0, 0.1), 0.1)
    before = at(s, 0.18)[0, 0]
    s.add(chunk(-1.0, 0.18), 0.18)
    assert at(s, 0.18)[0, 0] == pytest.approx(before, abs=1e-3)
    assert at(s, 0.18 + CROSSOVER_S)[0, 0] == pytest.approx(-1.0)


def test_grippers_cross_over_at_once() -> None:
    s = scheduler()
    s.add(chunk(-1.0, 0.0, gripper=0.0), 0.0)
    s.add(chunk(1.0, 0.1, gripper=1.0), 0.1)
    assert at(s, 0.1)[0, 1] == 1.0


def test_a_single_other_plan_is_left_out_and_two_in_a_row_are_followed() -> None:
    """A policy that cannot decide is held to the plan that it has begun."""
    s = scheduler(confirmations=2)
    s.add(chunk(-1.0, 0.0), 0.0)
    assert not s.add(chunk(1.0, 0.1), 0.1)
    assert s.add(chunk(-1.0, 0.2), 0.2)
    assert not s.add(chunk(1.0, 0.3), 0.3)
    assert at(s, 0.6)[0, 0] == pytest.approx(-1.0)
    assert s.add(chunk(1.0, 0.4), 0.4)
    assert at(s, 0.4 + CROSSOVER_S)[0, 0] == pytest.approx(1.0)
    statistics = s.statistics
    assert (statistics.received, statistics.used) == (5, 3)
    assert (statistics.dropped_doubted, statistics.crossovers) == (2, 1)


def test_another_plan_is_followed_at_once_when_the_old_one_ends() -> None:
    """Pins: doubt that lets the horizon run out."""
    s = scheduler(confirmations=10)
    s.add(chunk(-1.0, 0.0), 0.0)
    assert s.add(chunk(1.0, 0.9), 0.9)


def test_chunks_that_agree_are_averaged() -> None:
    s = scheduler()
    s.add(chunk(0.0, 0.0), 0.0)
    s.add(chunk(0.2, 0.1), 0.1)
    assert at(s, 0.5)[0, 0] == pytest.approx(0.1)


def test_a_gripper_that_opens_is_no_other_plan() -> None:
    s = scheduler()
    s.add(chunk(0.0, 0.0, gripper=0.0), 0.0)
    s.add(chunk(0.0, 0.1, gripper=5.0), 0.1)
    assert s.statistics.crossovers == 0


def test_newest_first_counts_from_the_other_end() -> None:
    weights = np.exp([-1.0, -0.5, 0.0])
    s = TemporalEnsembleScheduler([False, True], m=0.5, newest_first=True)
    for stamp_s, value in ((0.0, 1.0), (0.02, 10.0), (0.04, 100.0)):
        s.add(chunk(value, stamp_s), stamp_s)
    expected = weights @ [1.0, 10.0, 100.0] / weights.sum()
    assert at(s, 0.5)[0, 0] == pytest.approx(expected)
    # the oldest does not reach 1.0 s
    expected = weights[1:] @ [10.0, 100.0] / weights[1:].sum()
    assert at(s, 1.0)[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "bad", [{"disagreement": -1.0}, {"crossover_s": 0.0}, {"confirmations": 0}]
)
def test_bad_guards_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Guard(**bad)  # type: ignore[arg-type]
