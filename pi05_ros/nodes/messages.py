"""Between the package's arrays and ROS messages, and the QoS of each kind of topic."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
)
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros import types
from pi05_ros.msg import ActionChunk
from pi05_ros.observation.decode import read_in_place
from pi05_ros.types import FloatArray, ImageArray

# Sensor data with room for half a second at 30 Hz: a process that the machine lets wait longer than
# the usual depth of 5 holds would lose frames.
IMAGE_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=15, reliability=ReliabilityPolicy.BEST_EFFORT
)
JOINT_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=5, reliability=ReliabilityPolicy.BEST_EFFORT
)
TRAJECTORY_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.RELIABLE
)
# `ros2 topic pub` is volatile since Iron: a transient-local subscriber would never match it.
INSTRUCTION_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)
LATCHED_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)

SHORTEST_MESSAGE_BYTES = 8
"""Four of encapsulation, and more than the three of padding that it may ask for."""

STAMP_END_BYTES = 12
"""Encapsulation and stamp of a serialized message whose first field is a std_msgs/Header."""


def to_time(stamp_s: float) -> Time:
    """Seconds → builtin_interfaces/Time."""
    total_ns = round(stamp_s * 1e9)
    return Time(sec=total_ns // 1_000_000_000, nanosec=total_ns % 1_000_000_000)


def to_duration(duration_s: float) -> Duration:
    """Seconds → builtin_interfaces/Duration."""
    total_ns = round(duration_s * 1e9)
    return Duration(sec=total_ns // 1_000_000_000, nanosec=total_ns % 1_000_000_000)


def to_seconds(value: Time | Duration) -> float:
    """builtin_interfaces Time or Duration → seconds."""
    return float(value.sec + value.nanosec * 1e-9)


def serialized_stamp_s(data: bytes) -> float:
    """The stamp of a serialized message whose first field is a std_msgs/Header.

    A CDR message is 4 bytes of encapsulation, whose second byte is 1 for little endian, and then
    the fields: int32 sec, uint32 nanosec. Reading them there spares the conversion of a picture
    (about 1 ms) that may never be used.

    Raises:
        ValueError: the message is too short to have a header.
    """
    if len(data) < STAMP_END_BYTES:
        raise ValueError(f"a serialized message of {len(data)} bytes has no header")
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return float(sec + nanosec * 1e-9)


def deserialized(data: bytes, message_type: type) -> Any:
    """A message of a raw subscription, which anybody on the network may have written.

    The last two bits of the encapsulation count bytes of padding at the end. Fast CDR takes them
    off without looking and reads anywhere, to a segmentation fault, where there is nothing else.

    Raises:
        ValueError: the bytes are no message of this type.
    """
    if len(data) < SHORTEST_MESSAGE_BYTES:
        raise ValueError(f"a serialized message of {len(data)} bytes holds nothing")
    try:
        return deserialize_message(data, message_type)
    except RuntimeError:  # rclpy's errors; their text is about the middleware's source
        raise ValueError(
            f"{len(data)} bytes are no {message_type.__name__}; who publishes them?"
        ) from None


def deserialized_picture(data: bytes, message_type: type) -> Any:
    """An Image or CompressedImage of a raw subscription, its pixels left where they are.

    rclpy copies 0.9 MB of pixels through an array of Python's: 1.9 ms, in which nothing else in the
    process runs, against 0.03 ms. What cannot be read in place, rclpy judges.

    Raises:
        ValueError: the bytes are no message of this type.
    """
    picture = read_in_place(data, f"sensor_msgs/msg/{message_type.__name__}")
    return deserialized(data, message_type) if picture is None else picture


def image_message(picture: ImageArray, stamp_s: float, frame_id: str) -> Image:
    """RGB [height, width, 3] → sensor_msgs/Image."""
    height, width, _ = picture.shape
    message = Image()
    message.header.stamp = to_time(stamp_s)
    message.header.frame_id = frame_id
    message.height, message.width, message.step = height, width, width * 3
    message.encoding = "rgb8"
    # bytes are taken as they are; an array would be checked element by element (54 ms a picture)
    message.data = picture.tobytes()
    return message


def joint_state_message(
    names: Sequence[str], positions: FloatArray, velocities: FloatArray, stamp_s: float
) -> JointState:
    """Positions and velocities [n] → sensor_msgs/JointState."""
    message = JointState(name=list(names))
    message.header.stamp = to_time(stamp_s)
    message.position = positions.tolist()
    message.velocity = velocities.tolist()
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
    message.points = [
        JointTrajectoryPoint(
            positions=position, velocities=velocity, time_from_start=to_duration(time_s)
        )
        for time_s, position, velocity in zip(
            times_from_start_s.tolist(), positions.tolist(), velocities.tolist(), strict=True
        )
    ]
    return message


def trajectory_arrays(
    message: JointTrajectory,
) -> tuple[FloatArray, list[list[float]], list[list[float]], list[list[float]]]:
    """Times from start [n] and rows of positions, velocities and accelerations, as they came.

    The rows may have the wrong length: the controller that executes them says so.
    """
    times_s = np.array([to_seconds(point.time_from_start) for point in message.points])
    return (
        times_s,
        [list(point.positions) for point in message.points],
        [list(point.velocities) for point in message.points],
        [list(point.accelerations) for point in message.points],
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
    )
    message.header.stamp = to_time(chunk.stamp_s)
    message.positions = chunk.actions.ravel().tolist()
    return message
