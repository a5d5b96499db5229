"""Pins: intervals that leave 0–1, are of another kind, or shrink to nothing for 0 or all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_lab.evaluation.statistics import t_quantile, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_known_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=100)
@given(st.integers(0, 500), st.integers(0, 500))
def test_the_share_lies_inside_and_failures_mirror(won: int, lost: int) -> None:
    interval, mirrored = (wilson_interval(count, won + lost) for count in (won, lost))
    if won + lost == 0:
        assert interval is None
        return
    assert interval is not None and mirrored is not None
    low, high = interval
    assert 0 <= low <= won / (won + lost) <= high <= 1 and low < high
    assert (1 - high, 1 - low) == pytest.approx(mirrored)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson_interval(5, 4)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (11, 2.201), (30, 2.042), (10**6, 1.960)],
)
def test_students_t_is_that_of_the_tables(freedom: int, expected: float) -> None:
    """1.96 for a dozen values makes the interval a tenth too narrow."""
    assert t_quantile(freedom) == pytest.approx(expected, abs=0.004)


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2 values"):
        t_quantile(0)
