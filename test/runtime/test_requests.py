"""Hangs and failures of inferences, and the wait for all frames of one trigger.

Faults pinned: a policy that hangs undetected or fails for ever; a damaged image that counts as a
failure of the policy; an inference on frames of two triggers, or none at all.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.device_errors import ErrorKind
from pi05_ros.executor import InferenceResult
from pi05_ros.requests import PATIENCE_S, RELEARN_S, ROUND_S, Fault, FrameSync, Watchdog
from pi05_ros.types import ActionChunk

CHUNK = ActionChunk(np.zeros((4, 2)), 1.0, 0.02)
GOOD = InferenceResult(CHUNK, None, 1.0, 0.0, 0.1, 0.01, 0.09)
BAD = replace(GOOD, chunk=None, error="ValueError: 3 of 8 actions are not finite")
DAMAGED = replace(BAD, stamp_s=None, error="DecodeError: camera 'high': data is cut short")
FULL = replace(BAD, error="OutOfMemoryError: CUDA out of memory", kind=ErrorKind.OUT_OF_MEMORY)
LOST = replace(BAD, error="AcceleratorError: CUDA error: device-side assert", kind=ErrorKind.STICKY)


def test_a_hang_is_counted_once_and_described_until_it_ends() -> None:
    watchdog = Watchdog(hang_timeout_s=2.0)
    assert watchdog.check_hang(None, 100.0) == ""
    assert watchdog.check_hang(100.0, 102.0) == ""
    assert "no answer for 2.5 s, limit 2 s" in watchdog.check_hang(100.0, 102.5)
    assert watchdog.check_hang(100.0, 103.0) == ""
    assert "no answer for 4.0 s" in watchdog.hang(100.0, 104.0)
    assert watchdog.hang(None, 104.1) == ""
    assert watchdog.check_hang(105.0, 108.0)
    assert watchdog.hangs == 2


def test_failures_in_a_row_are_a_fault() -> None:
    watchdog = Watchdog(max_failures=3)
    assert [watchdog.record_result(r) for r in (BAD, BAD, GOOD, BAD, BAD)] == [None] * 5
    fault = watchdog.record_result(BAD)
    assert fault is not None and not fault.device
    assert "3 inferences failed in a row" in fault.message
    assert "3 of 8 actions are not finite" in fault.message


@pytest.mark.parametrize("stamp_s", [1.0, None])
def test_out_of_memory_counts_as_a_failure_and_does_not_unload_the_policy(
    stamp_s: float | None,
) -> None:
    watchdog = Watchdog(max_failures=2)
    assert watchdog.record_result(replace(FULL, stamp_s=stamp_s)) is None
    fault = watchdog.record_result(replace(FULL, stamp_s=stamp_s))
    assert fault is not None and not fault.device and not fault.sticky


@pytest.mark.parametrize("stamp_s", [1.0, None])
def test_a_lost_device_is_a_fault_at_once(stamp_s: float | None) -> None:
    """Fault: three inferences on a CUDA context that is dead, then a policy loaded into it."""
    watchdog = Watchdog(max_failures=3)
    assert watchdog.record_result(replace(LOST, stamp_s=stamp_s)) == Fault(
        "the device is lost: AcceleratorError: CUDA error: device-side assert",
        device=True,
        sticky=True,
    )


def test_a_damaged_image_is_no_failure_of_the_policy() -> None:
    watchdog = Watchdog(max_failures=2)
    assert [watchdog.record_result(DAMAGED) for _ in range(10)] == [None] * 10
    assert watchdog.record_result(BAD) is None


def test_an_activation_begins_a_new_count() -> None:
    watchdog = Watchdog(max_failures=2)
    watchdog.record_result(BAD)
    watchdog.reset()
    assert watchdog.record_result(BAD) is None


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
