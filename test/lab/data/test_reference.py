"""Faults pinned: chunks compared at the wrong time, with plans that were never executed, or with
values invented over a gap.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_lab.data.recording import Command
from pi05_lab.data.reference import MAX_GAP_S, ReferenceTrajectory, Timeline

BOTH = (0, 1)


def command(start_s: float, times_s: list[float], rows: list[list[float]]) -> Command:
    return Command(0, start_s, start_s + np.array(times_s), np.array(rows), BOTH, "/c")


def test_set_points_count_from_their_stamp_and_are_linear_in_between() -> None:
    reference = ReferenceTrajectory(2)
    for k in range(5):
        reference.put_command(command(1 + 0.1 * k, [0.0], [[k, -k]]))
    values, known = reference.at(np.array([1.0, 1.05, 1.4, 1.45]), until_s=9.0)
    expected = np.array([[0, 0], [0.5, -0.5], [4, -4]])
    np.testing.assert_allclose(values[:3], expected)
    assert known.tolist() == [True, True, True, False]


def test_a_trajectory_is_dated_point_by_point_and_replaced_from_its_successors_start() -> None:
    reference = ReferenceTrajectory(2)
    reference.put_command(command(1.0, [0.0, 1.0], [[0, 0], [10, 0]]))
    reference.put_command(command(1.5, [0.5, 1.0], [[0, 0], [0, 0]]))
    values, known = reference.at(np.array([1.0, 1.25, 1.5, 1.75, 2.0]), until_s=9.0)
    # Half-way to 10, then from there back to 0.
    np.testing.assert_allclose(values[:, 0], [0, 2.5, 5, 2.5, 0], atol=1e-9)
    assert known.all()


def test_plans_that_were_not_executed_are_unknown() -> None:
    reference = ReferenceTrajectory(2)
    reference.put_command(command(1.0, [0.0, 1.0], [[0, 0], [10, 0]]))
    _, known = reference.at(np.array([1.2, 1.4]), until_s=1.3)
    assert known.tolist() == [True, False]


def test_joints_without_commands_are_compared_with_their_measured_positions() -> None:
    reference = ReferenceTrajectory(3)
    for k in range(11):
        reference.put_joints(1 + 0.1 * k, np.array([100.0, 100.0, k]))
        reference.put_command(command(1 + 0.1 * k, [0.0], [[k, -k]]))
    values, known = reference.at(np.array([1.55]), until_s=9.0)
    np.testing.assert_allclose(values, [[5.5, -5.5, 5.5]])
    assert known.all() and reference.commanded_columns == [0, 1]


def test_commands_that_begin_late_leave_the_time_before_unknown() -> None:
    """Else a recording is compared with measured positions, but reported as with commands."""
    reference = ReferenceTrajectory(2, [BOTH])
    for k in range(20):
        reference.put_joints(1 + 0.1 * k, np.array([1.0, 1.0]))
    _, known = reference.at(np.array([1.05]), until_s=9.0)
    assert not known.any() and reference.commanded_columns == [] and reference.awaited == [BOTH]
    for k in range(10):
        reference.put_command(command(2 + 0.1 * k, [0.0], [[7, 7]]))
    values, known = reference.at(np.array([1.5, 2.05]), until_s=9.0)
    assert known.tolist() == [False, True]
    np.testing.assert_allclose(values[1], [7, 7])
    assert reference.commanded_columns == [0, 1] and reference.begun_s == {BOTH: 2.0}


def test_joints_that_a_controllers_commands_leave_out_are_measured() -> None:
    reference = ReferenceTrajectory(3, [(0, 1, 2)])
    for k in range(11):
        reference.put_joints(1 + 0.1 * k, np.array([100.0, 100.0, k]))
        reference.put_command(command(1 + 0.1 * k, [0.0], [[k, -k]]))
    values, known = reference.at(np.array([1.55]), until_s=9.0)
    np.testing.assert_allclose(values, [[5.5, -5.5, 5.5]])
    assert known.all() and reference.awaited == []


def test_only_commands_at_the_control_rate_describe_the_motion_between_them() -> None:
    dense, sparse, measured = ReferenceTrajectory(2), ReferenceTrajectory(2), ReferenceTrajectory(2)
    for k in range(50):
        dense.put_command(command(1 + 0.02 * k, [0.0], [[k, k]]))
        if k % 5 == 0:
            sparse.put_command(command(1 + 0.02 * k, [0.0], [[k, k]]))
        measured.put_joints(1 + 0.02 * k, np.array([k, k], dtype=float))
    assert [t.is_dense(1.5, BOTH, 0.02) for t in (dense, sparse, measured)] == [True, False, False]
    assert not dense.is_dense(2.5, BOTH, 0.02)


def test_a_gap_is_unknown() -> None:
    line = Timeline()
    for time_s in (0.0, MAX_GAP_S, MAX_GAP_S + 0.5):
        line.append(time_s, np.array([time_s]))
    _, known = line.at(np.array([0.1, MAX_GAP_S + 0.2, MAX_GAP_S + 0.5]))
    assert known.tolist() == [True, False, True]


def test_velocity_is_the_mean_of_the_last_tenth_of_a_second() -> None:
    reference = ReferenceTrajectory(1)
    for k in range(20):
        reference.put_joints(0.02 * k, np.array([3 * 0.02 * k]))
    velocity = reference.velocity(0.38)
    assert velocity is not None
    np.testing.assert_allclose(velocity, [3.0])
    assert reference.velocity(0.05) is None


@given(
    gaps=st.lists(st.floats(0.01, 0.25), min_size=2, max_size=30),
    share=st.floats(0, 1),
    cut=st.floats(0, 1),
)
@settings(max_examples=60)
def test_a_straight_line_is_exact_everywhere_also_after_trimming(
    gaps: list[float], share: float, cut: float
) -> None:
    times_s = np.cumsum(gaps)
    line = Timeline()
    for time_s in times_s:
        line.append(float(time_s), np.array([2 * time_s, -time_s]))
    begin = times_s[0] + cut * (times_s[-1] - times_s[0])
    line.trim(float(begin))
    time_s = begin + share * (times_s[-1] - begin)
    values, known = line.at(np.array([time_s]))
    assert known.all()
    np.testing.assert_allclose(values, [[2 * time_s, -time_s]], atol=1e-5)
    assert len(line.times_s) <= len(times_s)


def test_memory_is_bounded_by_trimming() -> None:
    line = Timeline()
    for k in range(5000):
        line.append(0.01 * k, np.zeros(1))
        line.trim(0.01 * k - 1.0)
    assert len(line.times_s) < 120
