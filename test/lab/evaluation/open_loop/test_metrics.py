"""Faults pinned: means over unknown steps, gripper changes measured in their units, figures that
depend on a recording's length or grow with it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_lab.data.bags import Notes
from pi05_lab.evaluation import statistics as motion_measures
from pi05_lab.evaluation.open_loop.metrics import (
    WINDOW_S,
    Decimated,
    ErrorSums,
    GripperTally,
    MotionWindows,
    Samples,
    StreamStatistics,
    gripper_f1,
)
from pi05_lab.evaluation.statistics import bootstrap_interval
from pi05_ros.types import JointGroup, JointSpec

JOINTS = JointGroup(
    [
        JointSpec("arm", -2, 2, 1, 1),
        JointSpec("grip", 0.0, 0.04, 1, 1, gripper=True),
    ]
)
STEPS, SHORT = 12, 4
ALL = np.ones(STEPS, dtype=bool)


def test_errors_are_summed_over_known_steps_alone() -> None:
    sums = ErrorSums(SHORT, 2)
    known = np.array([True, True, False, False])
    reference = np.zeros((SHORT, 2))
    by_joint = sums.add(np.tile([[0.3, -0.1]], (SHORT, 1)), reference, known)
    np.testing.assert_allclose(by_joint, [0.3, 0.1])
    sums.add(np.tile([[0.1, 0.0]], (SHORT, 1)), reference, np.ones(SHORT, dtype=bool))
    found = sums.row(np.array([True, False]))
    np.testing.assert_allclose(found.by_joint, [2 * 0.3 + 4 * 0.1, 0.2])
    np.testing.assert_allclose(found.squared_by_joint, [2 * 0.09 + 4 * 0.01, 0.02])
    np.testing.assert_allclose(found.by_step, [0.4, 0.4, 0.1, 0.1])
    assert found.steps == [2, 2, 1, 1] and found.chunks == 2


OPEN, CLOSED = 0.04, 0.01


def chunk(*changes: int, first: float = OPEN) -> np.ndarray:
    """[STEPS, 2]: the gripper goes to its other end at each of these steps."""
    other = OPEN + CLOSED - first
    grip = [other if sum(k >= c for c in changes) % 2 else first for k in range(STEPS)]
    return np.stack((np.zeros(STEPS), np.array(grip)), axis=1)


def tallied(predicted: np.ndarray, recorded: np.ndarray, known: np.ndarray = ALL) -> GripperTally:
    tally = GripperTally(JOINTS)
    tally.add(predicted, recorded, known, np.array([0.0, OPEN]), 0.0, 0.1)
    return tally


@pytest.mark.parametrize(
    ("predicted", "recorded", "expected"),
    [
        (chunk(3), chunk(4), (1, 0, 0, -0.1)),
        (chunk(6), chunk(4), (1, 0, 0, 0.2)),
        (chunk(), chunk(4), (0, 1, 0, None)),
        (chunk(4), chunk(), (0, 0, 1, None)),
        (chunk(), chunk(), (0, 0, 0, None)),
        (chunk(1), chunk(5), (0, 1, 1, None)),
        (chunk(0), chunk(0), (1, 0, 0, 0.0)),
        # The counterpart may lie after the chunk's end.
        (chunk(10), chunk(), (0, 0, 0, None)),
        (chunk(), chunk(10), (0, 0, 0, None)),
    ],
)
def test_gripper_changes_are_matched_within_a_tolerance(
    predicted: np.ndarray, recorded: np.ndarray, expected: tuple
) -> None:
    found = tallied(predicted, recorded).row()
    assert (found.found, found.missed, found.invented) == expected[:3]
    assert found.offsets_s == ([] if expected[3] is None else [pytest.approx(expected[3])])


def test_a_chunk_is_scored_up_to_its_first_unknown_step() -> None:
    """Else the last second of an episode, where grippers open or close most, does not count."""
    known = np.arange(STEPS) < 8
    assert tallied(chunk(4), chunk(3), known).found == 1
    assert tallied(chunk(), chunk(3), known).missed == 1
    assert tallied(chunk(3), chunk(), known).invented == 1
    # The recorded change may come right after the known steps.
    assert tallied(chunk(7), chunk(), known).invented == 0
    assert tallied(chunk(3), chunk(3), np.zeros(STEPS, dtype=bool)).found == 0


def test_a_change_that_several_chunks_cover_counts_once() -> None:
    """Else "16 of 16 gripper changes" are seven."""
    tally = GripperTally(JOINTS)
    for start in range(0, 6, 2):
        now = np.array([0.0, OPEN])
        right, wrong = chunk(6 - start), chunk()
        tally.add(wrong if start == 0 else right, right, ALL, now, 0.1 * start, 0.1)
    found = tally.row()
    assert (found.found, found.missed) == (2, 1)
    assert (found.changes, found.changes_found) == (1, 1)
    tally.add(chunk(5, first=CLOSED), chunk(5, first=CLOSED), ALL, np.zeros(2), 1.0, 0.1)
    assert tally.row().changes == 2


def test_f1() -> None:
    assert gripper_f1(3, 1, 2) == pytest.approx(6 / 9)
    assert math.isnan(gripper_f1(0, 0, 0))


def test_one_window_has_the_measures_of_the_whole_motion_without_grippers() -> None:
    dt_s = 0.02
    times_s = dt_s * np.arange(round(3.0 / dt_s))
    motion = np.stack((np.sin(times_s), np.sign(np.sin(40 * times_s))), axis=1)
    windows = MotionWindows(dt_s, np.array([0]))
    for time_s, row in zip(times_s, motion, strict=True):
        windows.add(float(time_s), row)
    windows.end()
    ((duration_s, jerk, ldlj, sparc),) = windows.windows
    arm = motion[:, :1]
    assert duration_s == pytest.approx(3.0)
    assert jerk == motion_measures.rms_jerk(arm, dt_s)
    assert ldlj == motion_measures.log_dimensionless_jerk(arm, dt_s)
    assert sparc == motion_measures.spectral_arc_length(arm, dt_s)


def test_a_long_motion_is_cut_into_windows_without_a_short_rest() -> None:
    windows = MotionWindows(0.02, np.array([0]))
    for k in range(round((2 * WINDOW_S + 0.5) / 0.02)):
        windows.add(0.02 * k, np.array([math.sin(0.02 * k)]))
    windows.end()
    assert len(windows.windows) == 2


def test_a_gap_ends_a_window() -> None:
    """Else the jump over the gap is a jerk of thousands."""
    whole, cut = MotionWindows(0.02, np.array([0])), MotionWindows(0.02, np.array([0]))
    for k in range(200):
        row = np.array([math.sin(0.02 * k)])
        whole.add(0.02 * k, row)
        if not 80 <= k < 110:
            cut.add(0.02 * k, row)
    for windows in (whole, cut):
        windows.end()
    assert len(cut.windows) == 2
    largest = max(jerk for _, jerk, _, _ in cut.windows)
    assert largest < 1.5 * whole.windows[0][1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(2, 40))
def test_the_largest_of_a_decimated_series_is_the_largest_of_all(
    values: list[float], limit: int
) -> None:
    series = Samples(limit)
    for value in values:
        series.add(value)
    assert series.largest == max(values)


@given(count=st.integers(0, 700), limit=st.integers(2, 40))
@settings(max_examples=60)
def test_a_decimated_series_is_bounded_and_evenly_spaced_from_its_first_item(
    count: int, limit: int
) -> None:
    series = Decimated(limit)
    for k in range(count):
        series.add(k)
    items = series.items
    assert len(items) <= limit and series.count == count
    assert items[:1] == ([0] if count else [])
    assert len(set(np.diff(items))) <= 1
    assert count <= limit or len(items) >= limit // 2


def test_gaps_and_order_of_a_stream() -> None:
    stream = StreamStatistics("/t")
    stamps_s = [0.02 * k for k in range(100)] + [2.5 + 0.02 * k for k in range(100)]
    for stamp_s in [*stamps_s[:150], stamps_s[140], *stamps_s[150:]]:
        stream.add(stamp_s, stamp_s + 0.003)
    found = stream.row(start_s=-1.0, end_s=6.0)
    assert found.messages == 201 and found.gaps == 1 and found.out_of_order == 1
    assert found.longest_gaps == [[520.0, 2.98]]
    assert found.period_ms[0] == pytest.approx(20.0)
    assert found.age_ms == pytest.approx([3.0, 3.0, 3.0])
    assert found.first_s == 1.0 and found.silent_s == pytest.approx(6.0 - 4.48)


def test_one_gap_in_a_long_stream_is_its_largest_period() -> None:
    """Fault: the maximum of a decimated series was 33 ms for a pause of 4 s."""
    stream = StreamStatistics("/t")
    for k in range(9001):
        time_s = k / 30 + 4.0 * (k > 4444)
        stream.add(time_s, time_s)
    found = stream.row(start_s=0.0, end_s=400.0)
    assert found.period_ms[2] == pytest.approx(4033.3, abs=0.1)


def test_notes_that_differ_in_numbers_alone_are_one() -> None:
    notes = Notes()
    notes.add("camera 'a': newest is 0.25 s old", 1.0)
    notes.add("camera 'a': newest is 0.31 s old", 2.0)
    notes.add("camera 'b': newest is 0.31 s old", 3.0)
    assert [(n.text, n.count, n.first_s) for n in notes] == [
        ("camera 'a': newest is 0.25 s old", 2, 1.0),
        ("camera 'b': newest is 0.31 s old", 1, 3.0),
    ]


def test_the_bootstrap_covers_a_known_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        values = rng.normal(1.0, 1.0, size=30)
        interval = bootstrap_interval(values.tolist(), [1.0] * 30, resamples=300, seed=seed)
        assert interval is not None
        hits += interval[0] <= 1.0 <= interval[1]
    assert 0.88 <= hits / 200 <= 0.98


def test_the_bootstrap_of_few_or_odd_values() -> None:
    assert bootstrap_interval([1.0], [1.0]) is None
    # Four episodes or fewer give an interval that is much too narrow.
    assert bootstrap_interval([2.0] * 4, [1.0] * 4) is None
    assert bootstrap_interval([1.0] * 5, [0.0] * 5) is None
    assert bootstrap_interval([2.0, 4.0] * 3, [1.0, 2.0] * 3) == (2.0, 2.0)
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        bootstrap_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0, 2.0], [1.0, 1.0], confidence=1.0)
