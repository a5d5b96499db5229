"""Faults pinned: a history without bound, the past of another clock in the rate or the choice,
lost frames that are not counted; frozen or black images used for ever; undecodable images that are
no problem; a slow or briefly stuttering camera taken for a frozen one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.observation.buffer import CameraStream, Gates, NotReady, ObservationBuffer
from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.stream import ImageRules, Stream, is_one_colour, same_bytes
from pi05_ros.types import ImageArray


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
    """One frame in ten of 30 Hz is lost; an outage is not counted."""
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


RULES = ImageRules(frozen_after_s=1.0, refuse_one_colour=True, unusable_after_s=0.5)
RNG = np.random.default_rng(0)


def make_buffer(rules: ImageRules = RULES, optional: bool = False) -> ObservationBuffer:
    buffer = ObservationBuffer(
        [CameraStream("high"), CameraStream("wrist", required=not optional)],
        ["a"],
        Gates(max_image_age_s=10.0, max_skew_s=10.0, max_joint_age_s=10.0, images=rules),
    )
    buffer.set_instruction("lift")
    return buffer


def noise() -> ImageArray:
    return RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def put(buffer: ObservationBuffer, camera: str, stamp_s: float, image: Any) -> None:
    """As the node does: what is decoded later, and its bytes."""
    content = image.tobytes() if isinstance(image, np.ndarray) else image
    buffer.put_image(camera, stamp_s, image, content)
    buffer.put_joints(stamp_s, np.zeros(1))


def problem(buffer: ObservationBuffer, now_s: float, camera: str = "high") -> str:
    lines = [found.text for found in buffer.problems(now_s) if camera in found.names]
    assert len(lines) <= 1
    return lines[0] if lines else ""


def usable(buffer: ObservationBuffer, now_s: float) -> bool:
    try:
        buffer.snapshot(now_s)
    except NotReady:
        return False
    return True


@pytest.mark.parametrize("rate_hz", [2.0, 5.0, 30.0, 120.0])
def test_a_frozen_camera_warns_then_stops_inference_and_recovers(rate_hz: float) -> None:
    buffer = make_buffer()
    stuck = noise()
    for i in range(int(3 * rate_hz) + 1):
        t = 100.0 + i / rate_hz
        put(buffer, "high", t, stuck.copy())
        put(buffer, "wrist", t, noise())
        frozen = t - 100.0 >= 1.0 - 1e-9
        assert bool(problem(buffer, t)) is frozen
        assert usable(buffer, t) is (t - 100.0 < 1.5 - 1e-9)
        assert problem(buffer, t, "wrist") == ""
    text = problem(buffer, t)
    assert text.startswith("camera 'high': images are equal to the byte for more than 1 s; check")
    assert "faults.frozen_image_s" in text
    put(buffer, "high", t + 1 / rate_hz, noise())
    assert problem(buffer, t + 1 / rate_hz) == "" and usable(buffer, t + 1 / rate_hz)


def test_one_changed_byte_anywhere_is_another_image() -> None:
    """Fault: a sample of the bytes that misses the only change, and calls the camera frozen."""
    buffer = make_buffer()
    image = noise()
    for i in range(90):
        image = image.copy()
        image[RNG.integers(48), RNG.integers(64), RNG.integers(3)] ^= 1
        put(buffer, "high", i / 30, image)
        put(buffer, "wrist", i / 30, noise())
        assert problem(buffer, i / 30) == ""


@pytest.mark.parametrize(("rate_hz", "repeats"), [(30.0, 2), (30.0, 15), (5.0, 2), (0.5, 2)])
def test_a_camera_that_repeats_some_images_is_not_frozen(rate_hz: float, repeats: int) -> None:
    """Each image comes several times, as a bag at another rate or a slow sensor has it."""
    buffer = make_buffer()
    image = noise()
    for i in range(100):
        if i % repeats == 0:
            image = noise()
        put(buffer, "high", i / rate_hz, image)
        put(buffer, "wrist", i / rate_hz, noise())
        assert problem(buffer, i / rate_hz) == ""


def test_a_clock_that_jumps_back_restarts_the_count() -> None:
    buffer = make_buffer()
    stuck = noise()
    for i in range(40):
        put(buffer, "high", 100.0 + i / 30, stuck)
    assert problem(buffer, 101.3)
    put(buffer, "high", 50.0, stuck)
    assert "frozen" not in problem(buffer, 50.0) and "equal" not in problem(buffer, 50.0)
    buffer.clear()
    put(buffer, "high", 50.1, stuck)
    assert problem(buffer, 50.1) == ""


def test_without_rules_or_content_nothing_is_checked() -> None:
    for rules, content in ((ImageRules(), b"same"), (RULES, None)):
        buffer = make_buffer(rules)
        for i in range(90):
            buffer.put_image("high", i / 30, b"same", content)
        assert problem(buffer, 89 / 30) == ""


def test_an_optional_camera_that_is_frozen_is_left_out() -> None:
    buffer = make_buffer(optional=True)
    stuck = noise()
    for i in range(91):
        put(buffer, "high", i / 30, noise())
        put(buffer, "wrist", i / 30, stuck)
    assert set(buffer.snapshot(3.0).messages) == {"high"}
    assert "equal to the byte" in problem(buffer, 3.0, "wrist")


def as_it_is(message: Any) -> ImageArray:
    if isinstance(message, bytes):
        raise DecodeError(f"encoding: {message.decode()} is not known")
    return np.asarray(message)


def infer(buffer: ObservationBuffer, stamp_s: float, high: Any, wrist: Any) -> set[str]:
    """One observation's cameras."""
    put(buffer, "high", stamp_s, high)
    put(buffer, "wrist", stamp_s, wrist)
    return set(buffer.observe(buffer.snapshot(stamp_s), as_it_is).images)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (12, 200, 40)])
def test_one_colour_warns_at_once_then_stops_inference_and_recovers(
    colour: tuple[int, int, int],
) -> None:
    buffer = make_buffer()
    flat = np.full((48, 64, 3), colour, np.uint8)
    flat[::2] -= np.uint8(colour[0] == 255)  # within one grey value
    assert infer(buffer, 1.0, flat, noise()) == {"high", "wrist"}
    assert "camera 'high': the image has one colour" in problem(buffer, 1.0)
    assert infer(buffer, 1.4, flat, noise()) == {"high", "wrist"}
    with pytest.raises(DecodeError, match="camera 'high': the image has one colour"):
        infer(buffer, 1.5, flat, noise())
    assert infer(buffer, 1.6, noise(), noise()) == {"high", "wrist"}
    assert problem(buffer, 1.6) == ""
    assert infer(buffer, 1.7, flat, noise()) == {"high", "wrist"}


def test_an_optional_camera_of_one_colour_is_masked() -> None:
    buffer = make_buffer(optional=True)
    flat = np.zeros((48, 64, 3), np.uint8)
    assert infer(buffer, 1.0, noise(), flat) == {"high", "wrist"}
    assert infer(buffer, 2.0, noise(), flat) == {"high"}


def test_one_colour_is_accepted_where_the_rule_is_off() -> None:
    buffer = make_buffer(ImageRules(unusable_after_s=0.0))
    assert infer(buffer, 1.0, np.zeros((48, 64, 3), np.uint8), noise()) == {"high", "wrist"}
    assert problem(buffer, 1.0) == ""


def test_an_undecodable_image_is_its_cameras_problem_until_one_decodes() -> None:
    buffer = make_buffer()
    with pytest.raises(DecodeError, match="camera 'high': encoding: mono16 is not known"):
        infer(buffer, 1.0, b"mono16", b"mono12")
    assert problem(buffer, 1.0) == "camera 'high': encoding: mono16 is not known"
    assert problem(buffer, 1.0, "wrist") == "camera 'wrist': encoding: mono12 is not known"
    with pytest.raises(DecodeError, match="camera 'wrist'"):
        infer(buffer, 1.1, noise(), b"mono12")
    assert problem(buffer, 1.1) == ""  # although the other camera's image fails
    infer(buffer, 1.2, noise(), noise())
    assert buffer.problems(1.2) == []


def test_a_new_activation_checks_decoded_images_anew() -> None:
    buffer = make_buffer()
    with pytest.raises(DecodeError):
        infer(buffer, 1.0, b"mono16", noise())
    buffer.accept_sizes()
    assert buffer.problems(1.0) == []


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_bytes_are_compared_exactly(first: bytes, second: bytes) -> None:
    assert same_bytes(first, second) is (first == second)
    assert same_bytes(memoryview(first), bytes(first))
    assert not same_bytes(None, first)


@given(st.integers(1, 80), st.integers(1, 80), st.tuples(*[st.integers(0, 254)] * 3), st.booleans())
def test_one_colour_of_any_size(
    height: int, width: int, colour: tuple[int, int, int], brighter: bool
) -> None:
    image = np.full((height, width, 3), colour, np.uint8)
    image[0, 0, 1] += brighter
    assert is_one_colour(image)
    if height * width > 1:
        image[0, 0] ^= 128
        assert not is_one_colour(image)
