"""Messages keep what the arrays said, bit by bit where it matters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.nodes.messages import (
    chunk_message,
    deserialize,
    deserialize_image,
    image_message,
    serialized_stamp_s,
    to_duration,
    to_seconds,
    to_time,
    trajectory_arrays,
    trajectory_message,
)
from pi05_ros.observation.decode import decode_image
from pi05_ros.types import ActionChunk


@given(st.integers(min_value=0, max_value=2**31 - 2), st.integers(min_value=0, max_value=999_999))
def test_times_keep_their_microseconds(seconds: int, micros: int) -> None:
    """Pins: 0.9999999999 s becoming nanosec = 10^9, which DDS peers read as another time."""
    stamp_s = seconds + micros * 1e-6
    time = to_time(stamp_s)
    assert time.nanosec < 1_000_000_000
    assert to_seconds(time) == pytest.approx(stamp_s, abs=1e-6)


def test_durations_round_up_to_a_whole_second() -> None:
    assert to_duration(0.9999999999).sec == 1
    assert to_duration(0.9999999999).nanosec == 0


@pytest.mark.parametrize("message_type", [Image, CompressedImage])
def test_stamp_is_read_from_the_serialized_message(message_type: type) -> None:
    """Pins: a change of the middleware's encapsulation, which the offsets depend on."""
    message = message_type()
    message.header.stamp.sec, message.header.stamp.nanosec = 1_700_000_123, 456_789_000
    message.header.frame_id = "cam_high"
    data = serialize_message(message)
    assert serialized_stamp_s(data) == pytest.approx(1_700_000_123.456789, abs=1e-6)


def test_stamp_of_a_message_without_header_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        serialized_stamp_s(b"\0\1\0\0\0")


@pytest.mark.parametrize("message_type", [Image, CompressedImage, JointState, String])
def test_bytes_of_a_raw_subscription_are_a_message_or_refused(message_type: type) -> None:
    """Pins: four bytes that declare padding make Fast CDR read anywhere."""
    assert deserialize(serialize_message(message_type()), message_type) == message_type()
    for length in range(8):
        with pytest.raises(ValueError, match=f"{length} bytes holds nothing"):
            deserialize(b"\0\1\0\3\0\0\0\0"[:length], message_type)
    with pytest.raises(ValueError, match=f"are not a {message_type.__name__}"):
        deserialize(b"\0\1\0\0" + b"\xff" * 20, message_type)


@given(st.text(max_size=9), st.text(max_size=9), st.binary(max_size=40), st.binary(max_size=9))
def test_images_are_read_in_place_as_rclpy_reads_them(
    frame_id: str, text: str, data: bytes, behind: bytes
) -> None:
    """Pins: a padding that one of the two readers counts otherwise, a copy of each image."""
    frame_id, text = frame_id.replace("\0", "0"), text.replace("\0", "0")
    image = Image(height=3, width=5, step=7, encoding=text, data=data)
    compressed = CompressedImage(format=text, data=data)
    for message in (image, compressed):
        message.header.frame_id = frame_id
        serialized = serialize_message(message)
        read = deserialize_image(serialized, type(message))
        for field in message.get_fields_and_field_types():
            if field not in ("header", "data"):
                assert getattr(read, field) == getattr(message, field)
        assert read.header.frame_id == frame_id
        assert bytes(read.data) == data
        if data:
            assert np.shares_memory(read.data, np.frombuffer(serialized, np.uint8))
        longer = deserialize_image(serialized + behind, type(message))
        assert bytes(longer.data) == data


@pytest.mark.parametrize("message_type", [Image, CompressedImage])
def test_bytes_that_are_not_an_image_are_refused(message_type: type) -> None:
    for junk in (b"", b"\0\1\0\0", b"\0\1\0\0" + b"\xff" * 40, b"\7" * 30):
        with pytest.raises(ValueError, match=r"holds nothing|are not a (Compressed)?Image"):
            deserialize_image(junk, message_type)


def test_images_survive() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    message = image_message(pixels, 12.5, "cam_high")
    assert (message.height, message.width, message.step) == (6, 10, 30)
    assert np.array_equal(decode_image(message), pixels)


def test_trajectories_survive() -> None:
    times_s = np.array([0.02, 0.04])
    positions = np.array([[0.1, 0.2], [0.3, 0.4]])
    velocities = np.array([[1.0, 2.0], [0.0, 0.0]])
    message = trajectory_message(["a", "b"], 3.25, times_s, positions, velocities)
    assert isinstance(message, JointTrajectory)
    assert message.joint_names == ["a", "b"]
    assert to_seconds(message.header.stamp) == 3.25
    got_times_s, got_positions, got_velocities, accelerations = trajectory_arrays(message)
    assert np.allclose(got_times_s, times_s, atol=1e-9)
    assert np.array_equal(got_positions, positions)
    assert np.array_equal(got_velocities, velocities)
    assert not any(accelerations)


def test_chunks_are_laid_out_row_by_row() -> None:
    """Pins: a transposed chunk, which only a peer would notice."""
    actions = np.arange(6.0).reshape(3, 2)
    chunk = ActionChunk(actions, stamp_s=1.5, dt_s=0.02, instruction="wave", timings_s={"a": 0.1})
    message = chunk_message(chunk, ["left", "right"], latency_s=0.25)
    assert message.horizon == 3
    assert list(message.positions) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (message.instruction, message.dt_s, message.latency_s) == ("wave", 0.02, 0.25)
    assert (message.stages, list(message.stage_s)) == (["a"], [0.1])
