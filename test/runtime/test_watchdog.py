"""Faults pinned: a policy that hangs unseen, one that fails for ever, a damaged picture that is
counted as the policy's failure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pi05_ros.device_errors import ErrorKind
from pi05_ros.executor import InferenceResult
from pi05_ros.types import ActionChunk
from pi05_ros.watchdog import Fault, Watchdog

CHUNK = ActionChunk(np.zeros((4, 2)), 1.0, 0.02)
GOOD = InferenceResult(CHUNK, None, 1.0, 0.0, 0.1, 0.01, 0.09)
BAD = replace(GOOD, chunk=None, error="ValueError: 3 of 8 actions are not finite")
DAMAGED = replace(BAD, stamp_s=None, error="DecodeError: camera 'high': data is cut short")
FULL = replace(BAD, error="OutOfMemoryError: CUDA out of memory", kind=ErrorKind.OUT_OF_MEMORY)
LOST = replace(BAD, error="AcceleratorError: CUDA error: device-side assert", kind=ErrorKind.STICKY)


def test_a_hang_is_told_once_and_shown_until_it_is_over() -> None:
    watchdog = Watchdog(hang_timeout_s=2.0)
    assert watchdog.check_hang(None, 100.0) is None
    assert watchdog.check_hang(100.0, 102.0) is None
    assert "no answer for 2.5 s, limit 2 s" in (watchdog.check_hang(100.0, 102.5) or "")
    assert watchdog.check_hang(100.0, 103.0) is None
    assert "no answer for 4.0 s" in (watchdog.hang(100.0, 104.0) or "")
    assert watchdog.hang(None, 104.1) is None
    assert watchdog.check_hang(105.0, 108.0) is not None
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


def test_damaged_pictures_are_not_the_policys_failures() -> None:
    watchdog = Watchdog(max_failures=2)
    assert [watchdog.record_result(DAMAGED) for _ in range(10)] == [None] * 10
    assert watchdog.record_result(BAD) is None


def test_an_activation_begins_a_new_count() -> None:
    watchdog = Watchdog(max_failures=2)
    watchdog.record_result(BAD)
    watchdog.reset()
    assert watchdog.record_result(BAD) is None


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="hang_timeout_s"):
        Watchdog(hang_timeout_s=0.0)
    with pytest.raises(ValueError, match="max_failures"):
        Watchdog(max_failures=0)
