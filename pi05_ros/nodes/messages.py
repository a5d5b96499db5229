"""Conversion between arrays and ROS messages, and the QoS of each kind of topic."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros import types
from pi05_ros.msg import ActionChunk
from pi05_ros.observation.decode import decode_image, read_in_place
from pi05_ros.types import FloatArray, ImageArray

# Half a second of frames at 30 Hz: with the usual depth of 5, a busy machine would lose some.
IMAGE_QOS = QoSProfile(depth=15, reliability=ReliabilityPolicy.BEST_EFFORT)
JOINT_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
TRAJECTORY_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
# `ros2 topic pub` is volatile since Iron: a transient-local subscriber would never match it.
INSTRUCTION_QOS = QoSProfile(
    depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE
)
LATCHED_QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)

ImageType = type[Image] | type[CompressedImage]

SHORTEST_MESSAGE_BYTES = 8
"""Four of encapsulation, and more than the at most three of padding that it declares."""
STAMP_END_BYTES = 12
"""Encapsulation and stamp of a serialized message whose first field is a std_msgs/Header."""


def to_time(stamp_s: float) -> Time:
    sec, nanosec = divmod(round(stamp_s * 1e9), 1_000_000_000)
    return Time(sec=sec, nanosec=nanosec)


def to_duration(duration_s: float) -> Duration:
    sec, nanosec = divmod(round(duration_s * 1e9), 1_000_000_000)
    return Duration(sec=sec, nanosec=nanosec)


def to_seconds(value: Time | Duration) -> float:
    return float(value.sec + value.nanosec * 1e-9)


def serialized_stamp_s(data: bytes) -> float:
    """The stamp of a serialized message whose first field is a std_msgs/Header.

    A CDR message is 4 bytes of encapsulation, whose second byte is 1 for little endian, and then
    the fields: int32 sec, uint32 nanosec. Reading them in place avoids the conversion of an image
    (about 1 ms) that may never be used.

    Raises:
        ValueError: the message is too short to have a header.
    """
    if len(data) < STAMP_END_BYTES:
        raise ValueError(f"a serialized message of {len(data)} bytes has no header")
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return float(sec + nanosec * 1e-9)


def deserialize(data: bytes, message_type: type) -> Any:
    """A message of a raw subscription; the bytes may come from any participant on the network.

    The last two bits of the encapsulation count bytes of padding at the end. Fast CDR subtracts
    them unchecked: a message without other bytes makes it read out of bounds (segmentation fault).

    Raises:
        ValueError: the bytes are not a message of this type.
    """
    if len(data) < SHORTEST_MESSAGE_BYTES:
        raise ValueError(f"a serialized message of {len(data)} bytes holds nothing")
    try:
        return deserialize_message(data, message_type)
    except RuntimeError:  # rclpy's errors; their text is about the middleware's source
        raise ValueError(
            f"{len(data)} bytes are not a {message_type.__name__}; "
            "find the publisher with ros2 topic info -v"
        ) from None


def deserialize_image(data: bytes, message_type: type) -> Any:
    """An Image or CompressedImage of a raw subscription; the pixels are not copied.

    rclpy copies 0.9 MB of pixels through a Python array: 1.9 ms with the interpreter locked,
    against 0.03 ms. rclpy reads the messages that cannot be read in place.

    Raises:
        ValueError: the bytes are not a message of this type.
    """
    image = read_in_place(data, f"sensor_msgs/msg/{message_type.__name__}")
    return deserialize(data, message_type) if image is None else image


def decode_stored_image(stored: tuple[ImageType, bytes]) -> ImageArray:
    """Type and bytes of an image message → RGB [H, W, 3]; ValueError for any other bytes."""
    image_type, data = stored
    return decode_image(deserialize_image(data, image_type))


def image_message(image: ImageArray, stamp_s: float, frame_id: str) -> Image:
    """RGB [height, width, 3] → sensor_msgs/Image."""
    height, width, _ = image.shape
    message = Image(height=height, width=width, step=width * 3, encoding="rgb8")
    message.header.stamp = to_time(stamp_s)
    message.header.frame_id = frame_id
    # rclpy checks an array element by element (54 ms an image), but not bytes
    message.data = image.tobytes()
    return message


def joint_state_message(
    names: Sequence[str], positions: FloatArray, velocities: FloatArray, stamp_s: float
) -> JointState:
    """Positions and velocities [n] → sensor_msgs/JointState."""
    message = JointState(
        name=list(names), position=positions.tolist(), velocity=velocities.tolist()
    )
    message.header.stamp = to_time(stamp_s)
    return message


def trajectory_message(
    names: Sequence[str],
    stamp_s: float,
    times_from_start_s: FloatArray,
    positions: FloatArray,
    velocities: FloatArray,
) -> JointTrajectory:
    """Points [n_points, n_joints] → trajectory_msgs/JointTrajectory."""
    message = JointTrajectory(joint_names=list(names))
    message.header.stamp = to_time(stamp_s)
    times_s = times_from_start_s.tolist()
    message.points = [
        JointTrajectoryPoint(positions=row, velocities=speeds, time_from_start=to_duration(time_s))
        for time_s, row, speeds in zip(
            times_s, positions.tolist(), velocities.tolist(), strict=True
        )
    ]
    return message


def trajectory_arrays(
    message: JointTrajectory,
) -> tuple[FloatArray, list[list[float]], list[list[float]], list[list[float]]]:
    """Times from start [n], rows of positions, velocities and accelerations; lengths unchecked."""
    points = message.points
    return (
        np.array([to_seconds(point.time_from_start) for point in points]),
        [list(point.positions) for point in points],
        [list(point.velocities) for point in points],
        [list(point.accelerations) for point in points],
    )


def chunk_message(
    chunk: types.ActionChunk, joint_names: Sequence[str], latency_s: float
) -> ActionChunk:
    """A chunk in controller units → pi05_ros/ActionChunk."""
    message = ActionChunk(
        instruction=chunk.instruction,
        dt_s=chunk.dt_s,
        horizon=chunk.horizon,
        joint_names=list(joint_names),
        latency_s=latency_s,
        stages=list(chunk.timings_s),
        stage_s=[float(value) for value in chunk.timings_s.values()],
        positions=chunk.actions.ravel().tolist(),
    )
    message.header.stamp = to_time(chunk.stamp_s)
    return message
