"""Earlier observations for policies with a history.

Faults: the present frame in the place of an earlier one, frames of another time, a motion that
begins before the history is full.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.observation.buffer import CameraStream, Gates, History, NotReady, ObservationBuffer
from pi05_ros.observation.decode import DecodeError

DT_S = 0.02
CAMERAS = (CameraStream("high"), CameraStream("wrist", required=False))


def make_buffer(steps: int = 1, dt_s: float = DT_S, **gates: Any) -> ObservationBuffer:
    buffer = ObservationBuffer(CAMERAS, ("waist",), Gates(**gates), History(steps, dt_s))
    buffer.set_instruction("lift")
    return buffer


def put(buffer: ObservationBuffer, stamp_s: float, cameras: tuple[str, ...] = ("high",)) -> None:
    """A frame of each camera and a joint state; both tell the time."""
    for camera in cameras:
        buffer.put_image(camera, stamp_s, stamp_s)
    buffer.put_joints(stamp_s, np.array([stamp_s]))


def image_of(message: Any) -> np.ndarray:
    return np.full((1, 1, 3), round(message * 1000) % 256, np.uint8)


def test_the_past_is_oldest_first_and_dt_apart() -> None:
    buffer = make_buffer(steps=2)
    for tick in range(10):
        put(buffer, 1.0 + tick * DT_S, ("high", "wrist"))
    snapshot = buffer.snapshot(1.18)
    assert [round(earlier.stamp_s, 6) for earlier in snapshot.past] == [1.14, 1.16]
    observation = buffer.observe(snapshot, image_of, lambda positions: positions * 2)
    for earlier, stamp_s in zip(observation.past, (1.14, 1.16), strict=True):
        assert set(earlier.images) == {"high", "wrist"}
        assert earlier.images["high"][0, 0, 0] == round(stamp_s * 1000) % 256
        np.testing.assert_allclose(earlier.state, [2 * stamp_s])
        assert earlier.instruction == "lift" and not earlier.past


def test_nothing_is_observed_before_the_history_is_full() -> None:
    """The first frame is not taken twice."""
    buffer = make_buffer()
    put(buffer, 1.0)
    with pytest.raises(
        NotReady, match=r"camera 'high': no frame of 0\.02 s ago \(the policy needs"
    ):
        buffer.snapshot(1.0)
    assert any("no frame of" in problem.text for problem in buffer.problems(1.0))
    buffer.put_image("high", 1.0 + DT_S, 1.0 + DT_S)
    buffer.clear()
    put(buffer, 2.0)
    buffer.put_joints(2.0 + DT_S, np.zeros(1))
    with pytest.raises(NotReady, match="no frame of"):
        buffer.snapshot(2.0 + DT_S)


def test_a_gap_in_the_past_is_named() -> None:
    buffer = make_buffer(dt_s=0.1, max_skew_s=0.02)
    put(buffer, 1.0)
    put(buffer, 1.24)
    with pytest.raises(NotReady, match=r"nearest to 0\.10 s ago is 0\.100 s off, limit 0\.050 s"):
        buffer.snapshot(1.24)


def test_joint_states_of_the_past_are_needed_too() -> None:
    buffer = make_buffer(dt_s=0.1)
    for stamp_s in (0.9, 1.0):
        buffer.put_image("high", stamp_s, stamp_s)
    buffer.put_joints(1.0, np.zeros(1))
    with pytest.raises(NotReady, match=r"joint positions: none of 0\.10 s ago"):
        buffer.snapshot(1.0)


def test_an_earlier_image_that_cannot_be_decoded_is_an_error() -> None:
    buffer = make_buffer()
    put(buffer, 1.0)
    put(buffer, 1.0 + DT_S)

    def decode(message: Any) -> np.ndarray:
        if message == 1.0:
            raise DecodeError("cut short")
        return image_of(message)

    with pytest.raises(DecodeError, match="an earlier image: cut short"):
        buffer.observe(buffer.snapshot(1.0 + DT_S), decode)


def test_a_policy_without_history_keeps_one_frame() -> None:
    buffer = make_buffer(steps=0)
    for tick in range(5):
        put(buffer, 1.0 + tick * DT_S)
    assert buffer.snapshot(1.08).past == ()
    assert len(buffer._frames["high"]._items) == 1


def test_a_history_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1 s long"):
        History(steps=11, dt_s=0.1)


@given(
    steps=st.integers(1, 3),
    dt_s=st.floats(0.01, 0.1),
    period_s=st.floats(0.005, 0.05),
    jitter=st.lists(st.floats(-0.4, 0.4), min_size=60, max_size=60),
)
def test_every_earlier_frame_is_the_nearest_to_its_time(
    steps: int, dt_s: float, period_s: float, jitter: list[float]
) -> None:
    """For any rate of the camera and any jitter of its stamps."""
    buffer = make_buffer(steps, dt_s, max_image_age_s=1.0, max_joint_age_s=1.0)
    stamps_s = [1.0 + (tick + shift) * period_s for tick, shift in enumerate(jitter)]
    for stamp_s in stamps_s:
        put(buffer, stamp_s)
    try:
        snapshot = buffer.snapshot(stamps_s[-1])
    except NotReady:
        # the camera ran too short for this history
        assert stamps_s[0] > stamps_s[-1] - (steps - 0.5) * dt_s
        return
    for step, earlier in zip(range(steps, 0, -1), snapshot.past, strict=True):
        then_s = snapshot.stamp_s - step * dt_s
        nearest_s = min(stamps_s, key=lambda stamp_s: abs(stamp_s - then_s))
        off_s = abs(earlier.frame_stamps_s["high"] - then_s)
        assert off_s == pytest.approx(abs(nearest_s - then_s), abs=1e-9)
