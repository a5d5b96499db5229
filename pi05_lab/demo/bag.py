"""Records what `pi05 evaluate` needs while the demo runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from rclpy.node import Node
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_lab.data.bags import SerializedBagWriter
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    TRAJECTORY_QOS,
    deserialized_picture,
    serialized_stamp_s,
)

PICTURE_PERIOD_S = 0.1
"""Pictures are kept at 10 Hz, as JPEG: at the full rate, raw, a minute would be 5 GB."""
JPEG_QUALITY = 92


class DemoBag:
    """A bag of cameras, joint states, instructions and commands; spun with the demo's node."""

    def __init__(
        self, node: Node, path: Path, cameras: Sequence[str], controllers: Sequence[str]
    ) -> None:
        self._writer: SerializedBagWriter | None = SerializedBagWriter(path)
        self._cameras = len(cameras)
        self._round: dict[str, bytes] = {}
        self._round_s = self._written_s = -1.0
        for camera in cameras:
            node.create_subscription(
                Image,
                f"{camera}/image_raw",
                functools.partial(self._on_image, camera),
                IMAGE_QOS,
                raw=True,
            )
        plain: list[tuple[str, Any, Any]] = [
            ("joint_states", JointState, 50),
            ("instruction", String, INSTRUCTION_QOS),
            *(
                (f"{name}/joint_trajectory", JointTrajectory, TRAJECTORY_QOS)
                for name in controllers
            ),
        ]
        for topic, kind, qos in plain:
            name = f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"
            keep = functools.partial(self._write, f"/{topic}", name)
            node.create_subscription(kind, topic, keep, qos, raw=True)

    def close(self) -> None:
        """Finish the bag; what arrives later is not recorded."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _on_image(self, camera: str, data: bytes, info: Mapping[str, int]) -> None:
        # a round's pictures share a stamp; kept together, no reader meets two rounds at once
        stamp_s = serialized_stamp_s(data)
        if stamp_s != self._round_s:
            if int(stamp_s / PICTURE_PERIOD_S) == int(self._written_s / PICTURE_PERIOD_S):
                return
            self._round_s, self._round = stamp_s, {}
        self._round[camera] = data
        if len(self._round) == self._cameras:
            self._written_s = stamp_s
            for name, picture in self._round.items():
                self._write_picture(name, picture, info)

    def _write_picture(self, camera: str, data: bytes, info: Mapping[str, int]) -> None:
        image = deserialized_picture(data, Image)
        pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
        picture = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        message = CompressedImage(format="jpeg", data=coded.tobytes())
        stamp = image.header.stamp
        message.header.stamp = Time(sec=stamp.sec, nanosec=stamp.nanosec)
        message.header.frame_id = image.header.frame_id
        self._write(
            f"/{camera}/image_raw/compressed",
            "sensor_msgs/msg/CompressedImage",
            serialize_message(message),
            info,
        )

    def _write(self, topic: str, kind: str, data: bytes, info: Mapping[str, int]) -> None:
        """Under the time at which the middleware got it: this thread may be far behind."""
        if self._writer is not None:
            self._writer.write(topic, kind, info["received_timestamp"] or time.time_ns(), data)
