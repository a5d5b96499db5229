"""Faults pinned: a motion that starts at an encoder's glitch, at another robot's joint state, at an
arm that still moves, or far outside the limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.control.start_check import MIN_SPAN_S, StartCheck
from pi05_ros.types import FloatArray, JointGroup, JointSpec

JOINTS = JointGroup(
    [
        JointSpec("waist", -3.0, 3.0, 2.0, 10.0),
        JointSpec("elbow", -1.0, 1.0, 1.0, 10.0),
        JointSpec("grip", 0.0, 0.04, 0.15, 2.0, gripper=True),
    ]
)
HERE = np.array([0.5, -0.2, 0.02])


def standing(rate_hz: float, seconds: float = 1.0) -> tuple[FloatArray, FloatArray]:
    stamps_s = 100.0 + np.arange(round(seconds * rate_hz) + 1) / rate_hz
    return stamps_s, np.tile(HERE, (len(stamps_s), 1))


@pytest.mark.parametrize("rate_hz", [20, 50, 100, 500, 1000])
def test_an_arm_that_stands_may_start_at_any_usual_rate(rate_hz: float) -> None:
    stamps_s, positions = standing(rate_hz)
    positions += np.random.default_rng(0).uniform(-0.0004, 0.0004, positions.shape) * [1, 1, 0.05]
    proof = StartCheck(JOINTS).check(stamps_s, positions)
    assert proof.problem == "" and proof.positions is not None
    assert (proof.positions == positions[-1]).all()


@pytest.mark.parametrize("rate_hz", [20, 100, 1000])
def test_few_joint_states_prove_nothing(rate_hz: float) -> None:
    stamps_s, positions = standing(rate_hz, 0.04)
    proof = StartCheck(JOINTS).check(stamps_s, positions)
    assert proof.positions is None and proof.too_few and "20 Hz" in proof.problem
    proof = StartCheck(JOINTS).check(np.empty(0), np.empty((0, 3)))
    assert proof.positions is None and proof.too_few


def test_joint_states_before_a_gap_prove_nothing() -> None:
    stamps_s, positions = standing(100)
    stamps_s[-3:] += 0.3
    assert StartCheck(JOINTS).check(stamps_s, positions).too_few


def test_repeated_stamps_span_no_time() -> None:
    positions = np.tile(HERE, (50, 1))
    assert StartCheck(JOINTS).check(np.full(50, 100.0), positions).too_few


@pytest.mark.parametrize("wrong", [0.7, 50.0, 1e9, -1e308])
@pytest.mark.parametrize("back", [1, 2, 4])
def test_a_glitch_in_the_newest_states_is_named(wrong: float, back: int) -> None:
    stamps_s, positions = standing(100)
    positions[-back, 1] = wrong
    proof = StartCheck(JOINTS).check(stamps_s, positions)
    assert proof.positions is None and not proof.too_few
    assert proof.problem.startswith("start: joint 'elbow' jumps from ")
    assert f"{wrong:.4g}" in proof.problem and "second publisher" in proof.problem


def test_a_second_publisher_prevents_a_start_for_as_long_as_it_publishes() -> None:
    stamps_s, positions = standing(200)
    positions[::2, 0] = -1.0
    proof = StartCheck(JOINTS).check(stamps_s, positions)
    assert proof.positions is None and "'waist' jumps" in proof.problem
    later_s, after = standing(200, MIN_SPAN_S + 0.03)
    proof = StartCheck(JOINTS).check(
        np.concatenate((stamps_s, stamps_s[-1] + 0.005 + later_s - later_s[0])),
        np.concatenate((positions, after)),
    )
    assert proof.positions is not None


def test_a_second_publisher_with_equal_stamps_is_seen() -> None:
    stamps_s, positions = standing(100)
    stamps_s, positions = np.repeat(stamps_s, 2), np.repeat(positions, 2, axis=0)
    positions[::2, 0] = 0.55
    assert "'waist' jumps" in StartCheck(JOINTS).check(stamps_s, positions).problem


@pytest.mark.parametrize("position", [1.1, -1.1, 50.0, 1e9])
def test_a_joint_outside_its_limits_is_named(position: float) -> None:
    stamps_s, positions = standing(100)
    positions[:, 1] = position
    proof = StartCheck(JOINTS).check(stamps_s, positions)
    assert proof.positions is None
    assert proof.problem.startswith(f"start: joint 'elbow' is at {position:.4g}, outside")
    assert "joints.elbow.lower" in proof.problem


def test_the_tolerance_is_a_share_of_the_range() -> None:
    stamps_s, positions = standing(100)
    positions[:, 1] = 1.05
    assert StartCheck(JOINTS).check(stamps_s, positions).positions is not None
    assert StartCheck(JOINTS, tolerance=0.02).check(stamps_s, positions).positions is None


@pytest.mark.parametrize("rate_hz", [20, 100, 1000])
def test_an_arm_that_moves_must_rest_first(rate_hz: float) -> None:
    stamps_s, positions = standing(rate_hz)
    positions[:, 0] = 0.5 * 2.0 * (stamps_s - stamps_s[0]) - 1.0
    proof = StartCheck(JOINTS).check(stamps_s, positions)
    assert proof.positions is None and "'waist' moves" in proof.problem
    assert StartCheck(JOINTS, standing=False).check(stamps_s, positions).positions is not None


@pytest.mark.parametrize(("states", "tolerance"), [(1, 0.03), (5, -0.1), (5, float("nan"))])
def test_other_values_are_refused(states: int, tolerance: float) -> None:
    with pytest.raises(ValueError, match="start_"):
        StartCheck(JOINTS, states, tolerance)


@given(
    intervals_s=st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3]), min_size=1, max_size=80),
    values=st.lists(
        st.sampled_from([0.0, 0.004, 0.02, 0.5, 1.02, 1.07, -1.5, 50.0, 1e9, -1e308]),
        min_size=80, max_size=80,
    ),
    repeats=st.integers(1, 40),
)  # fmt: skip
def test_whatever_is_proven_agrees_stands_and_lies_within_limits(
    intervals_s: list[float], values: list[float], repeats: int
) -> None:
    """For any history: the proven position differs from none of the newest states by more than a
    standing arm moves, and no state beyond the limits and their tolerance is proven."""
    check = StartCheck(JOINTS)
    stamps_s = 100.0 + np.cumsum(intervals_s)
    positions = np.tile(HERE, (len(stamps_s), 1))
    positions[:, 1] = np.repeat(values, repeats)[: len(stamps_s)]
    proof = check.check(stamps_s, positions)
    if proof.positions is None:
        assert proof.problem.startswith("start: ")
        return
    assert (proof.positions >= check.lower).all() and (proof.positions <= check.upper).all()
    newest = (stamps_s >= stamps_s[-1] - MIN_SPAN_S) | (np.arange(len(stamps_s))[::-1] < 5)
    assert newest.sum() >= 5 and np.ptp(stamps_s[newest]) >= 0.04
    allowed = 0.1 * JOINTS.max_velocity * (np.ptp(stamps_s[newest]) + 0.2) + check.noise
    assert (np.abs(positions[newest] - proof.positions) <= allowed).all()
