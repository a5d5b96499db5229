"""Faults pinned: a history without bound, the past of another clock in the rate or the choice,
lost frames that are not counted."""

from __future__ import annotations

import pytest

from pi05_ros.observation.stream import Stream


def test_the_history_has_the_given_length() -> None:
    stream: Stream[int] = Stream(history_s=1.0)
    for i in range(500):
        stream.put(i * 0.01, i)
    assert stream.nearest(0.0).payload == 399
    assert stream.nearest(4.504).payload == 450
    newest_only: Stream[int] = Stream(history_s=0.0)
    newest_only.put(1.0, 1)
    newest_only.put(1.1, 2)
    assert newest_only.nearest(0.0).payload == 2


def test_a_clock_jump_clears_the_earlier_pass() -> None:
    stream: Stream[str] = Stream(history_s=1.0)
    for i in range(30):
        stream.put(50.0 + i / 30, "first pass")
    for i in range(30):
        stream.put(3.0 + i / 30, "second pass")
    statistics = stream.statistics(4.0)
    assert statistics.rate_hz == pytest.approx(30.0)
    assert (statistics.received, statistics.clock_jumps) == (60, 1)
    assert stream.nearest(50.0).payload == "second pass"


def test_a_frame_with_a_stamp_of_an_earlier_pass_counts_as_used_again() -> None:
    stream: Stream[str] = Stream(history_s=0.0)
    for stamp_s in (3.0, 9.0, 3.0):
        stream.put(stamp_s, "frame")
        stream.mark_used(stamp_s)
    assert stream.statistics(3.0).used == 3


@pytest.mark.parametrize("jitter_s", [0.0, 0.003])
def test_missing_frames_are_counted(jitter_s: float) -> None:
    """Every tenth of 30 Hz does not arrive; an outage is none of them."""
    stream: Stream[int] = Stream(history_s=0.0)
    sent = [i for i in range(300) if i % 10 != 7]
    for i in sent:
        stream.put(10.0 + i / 30 + jitter_s * (-1) ** i, i)
    assert stream.statistics(20.0).lost == 300 - len(sent)
    stream.put(60.0, 0)
    assert stream.statistics(60.0).lost == 300 - len(sent)


def test_a_change_of_rate_is_loss_only_until_it_is_usual() -> None:
    stream: Stream[int] = Stream(history_s=0.0)
    for i in range(30):
        stream.put(i / 30, i)
    for i in range(30):
        stream.put(1.0 + i / 10, i)
    assert 0 < stream.statistics(4.0).lost <= 2 * 15
