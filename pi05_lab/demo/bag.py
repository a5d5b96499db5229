"""Records what `pi05 evaluate` needs while the demo runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_lab.data.bags import BagWriter
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    TRAJECTORY_QOS,
    deserialize_image,
    serialized_stamp_s,
)

IMAGE_PERIOD_S = 0.1
"""Images are recorded at 10 Hz, as JPEG: at the full rate, raw, a minute would take 5 GB."""
JPEG_QUALITY = 92


class DemoBag:
    """A bag of cameras, joint states, instructions and commands; spun with the demo's node."""

    def __init__(
        self, node: Node, path: Path, cameras: Sequence[str], controllers: Sequence[str]
    ) -> None:
        self._writer: BagWriter | None = BagWriter(path)
        self._cameras = len(cameras)
        self._set: dict[str, bytes] = {}
        self._set_s = self._written_s = -1.0
        for camera in cameras:
            on_image = functools.partial(self._on_image, camera)
            node.create_subscription(Image, f"{camera}/image_raw", on_image, IMAGE_QOS, raw=True)
        others: list[tuple[str, Any, Any]] = [
            ("joint_states", JointState, 50),
            ("instruction", String, INSTRUCTION_QOS),
        ]
        for name in controllers:
            others.append((f"{name}/joint_trajectory", JointTrajectory, TRAJECTORY_QOS))
        for topic, message, qos in others:
            kind = f"{message.__module__.partition('.')[0]}/msg/{message.__name__}"
            on_message = functools.partial(self._on_message, f"/{topic}", kind)
            node.create_subscription(message, topic, on_message, qos, raw=True)

    def close(self) -> None:
        """Finish the bag; later messages are not recorded."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _on_image(self, camera: str, data: bytes, info: Mapping[str, int]) -> None:
        # The images of one control step share a stamp; written together, sets do not interleave.
        stamp_s = serialized_stamp_s(data)
        if stamp_s != self._set_s:
            if int(stamp_s / IMAGE_PERIOD_S) == int(self._written_s / IMAGE_PERIOD_S):
                return
            self._set_s, self._set = stamp_s, {}
        self._set[camera] = data
        if len(self._set) == self._cameras:
            self._written_s = stamp_s
            for name, image in self._set.items():
                self._write_image(name, image, info)

    def _write_image(self, camera: str, data: bytes, info: Mapping[str, int]) -> None:
        if self._writer is None:
            return
        image = deserialize_image(data, Image)
        stamp = image.header.stamp
        self._writer.write_jpeg(
            f"/{camera}/image_raw/compressed",
            stamp.sec * 1_000_000_000 + stamp.nanosec,
            image.header.frame_id,
            np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3),
            JPEG_QUALITY,
            _received_ns(info),
        )

    def _on_message(self, topic: str, kind: str, data: bytes, info: Mapping[str, int]) -> None:
        if self._writer is not None:
            self._writer.write(topic, kind, _received_ns(info), data)


def _received_ns(info: Mapping[str, int]) -> int:
    """When the middleware received a message; the thread that spins may be far behind."""
    return info["received_timestamp"] or time.time_ns()
