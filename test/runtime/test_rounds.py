"""Which frames one inference looks at."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.observation.frame_sync import PATIENCE_S, RELEARN_S, ROUND_S, FrameSync


def test_the_rest_of_a_round_is_waited_for_and_no_longer_than_it_may_take() -> None:
    """Pins: one camera seen a period later than the next; a camera that died stops inference."""
    rounds = FrameSync()
    assert rounds.within_s(1.0) == ROUND_S
    rounds.missed(1.0)
    rounds.missed(1.0 + 0.9 * PATIENCE_S)
    assert rounds.within_s(1.0 + 0.9 * PATIENCE_S) == ROUND_S
    assert rounds.within_s(1.0 + PATIENCE_S) == math.inf


def test_cameras_without_rounds_are_taken_as_they_come() -> None:
    """Pins: a wait at every inference for cameras that run by clocks of their own."""
    rounds = FrameSync()
    rounds.missed(1.0)
    rounds.taken(2 * ROUND_S, 1.0 + PATIENCE_S)
    assert rounds.within_s(1.1) == math.inf
    rounds.taken(2 * ROUND_S, 1.5)
    relearn_s = 1.0 + PATIENCE_S + RELEARN_S
    assert rounds.within_s(relearn_s - 0.01) == math.inf
    assert rounds.within_s(relearn_s + 0.01) == ROUND_S


def test_a_round_that_comes_about_is_no_reason_to_give_up_on_rounds() -> None:
    rounds = FrameSync()
    rounds.missed(1.0)
    rounds.taken(0.0, 1.0 + 0.5 * PATIENCE_S)
    assert rounds.within_s(1.1) == ROUND_S
    rounds.missed(1.1)
    assert rounds.within_s(1.1 + 0.9 * PATIENCE_S) == ROUND_S


def test_a_clock_that_jumps_is_forgotten() -> None:
    """Pins: no wait, or one without end, after a bag's loop."""
    rounds = FrameSync()
    rounds.missed(1000.0)
    rounds.taken(2 * ROUND_S, 1000.1)
    rounds.reset()
    assert rounds.within_s(1.0) == ROUND_S


@given(st.lists(st.tuples(st.floats(0.001, 0.5), st.floats(0.0, 0.05)), max_size=60))
def test_no_wait_is_longer_than_its_limit(asks: list[tuple[float, float]]) -> None:
    """Whatever the frames do: an ask that comes `PATIENCE_S` after the first is served."""
    rounds, now_s, waiting_since_s = FrameSync(), 0.0, None
    for gap_s, skew_s in asks:
        now_s += gap_s
        if skew_s > rounds.within_s(now_s):
            rounds.missed(now_s)
            waiting_since_s = now_s if waiting_since_s is None else waiting_since_s
            assert now_s - waiting_since_s < PATIENCE_S
        else:
            rounds.taken(skew_s, now_s)
            waiting_since_s = None
