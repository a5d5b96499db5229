"""Which frames one inference uses."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.observation.frame_sync import PATIENCE_S, RELEARN_S, ROUND_S, FrameSync


def test_the_wait_for_the_other_frames_is_bounded() -> None:
    """Pins: one camera seen a period later than the next; a camera that died stops inference."""
    sync = FrameSync()
    assert sync.max_skew_s(1.0) == ROUND_S
    sync.record_incomplete(1.0)
    sync.record_incomplete(1.0 + 0.9 * PATIENCE_S)
    assert sync.max_skew_s(1.0 + 0.9 * PATIENCE_S) == ROUND_S
    assert sync.max_skew_s(1.0 + PATIENCE_S) == math.inf


def test_cameras_without_a_common_trigger_disable_the_wait() -> None:
    """Pins: a wait at every inference for free-running cameras."""
    sync = FrameSync()
    sync.record_incomplete(1.0)
    sync.record_used(2 * ROUND_S, 1.0 + PATIENCE_S)
    assert sync.max_skew_s(1.1) == math.inf
    sync.record_used(2 * ROUND_S, 1.5)
    relearn_s = 1.0 + PATIENCE_S + RELEARN_S
    assert sync.max_skew_s(relearn_s - 0.01) == math.inf
    assert sync.max_skew_s(relearn_s + 0.01) == ROUND_S


def test_a_complete_set_of_frames_keeps_the_wait() -> None:
    sync = FrameSync()
    sync.record_incomplete(1.0)
    sync.record_used(0.0, 1.0 + 0.5 * PATIENCE_S)
    assert sync.max_skew_s(1.1) == ROUND_S
    sync.record_incomplete(1.1)
    assert sync.max_skew_s(1.1 + 0.9 * PATIENCE_S) == ROUND_S


def test_reset_clears_the_times() -> None:
    """Pins: no wait, or one without end, after a bag's loop."""
    sync = FrameSync()
    sync.record_incomplete(1000.0)
    sync.record_used(2 * ROUND_S, 1000.1)
    sync.reset()
    assert sync.max_skew_s(1.0) == ROUND_S


@given(st.lists(st.tuples(st.floats(0.001, 0.5), st.floats(0.0, 0.05)), max_size=60))
def test_no_wait_is_longer_than_its_limit(requests: list[tuple[float, float]]) -> None:
    """For any frames: a request that comes `PATIENCE_S` after the first is served."""
    sync, now_s, waiting_since_s = FrameSync(), 0.0, None
    for gap_s, skew_s in requests:
        now_s += gap_s
        if skew_s > sync.max_skew_s(now_s):
            sync.record_incomplete(now_s)
            waiting_since_s = now_s if waiting_since_s is None else waiting_since_s
            assert now_s - waiting_since_s < PATIENCE_S
        else:
            sync.record_used(skew_s, now_s)
            waiting_since_s = None
