"""The policy node's subscriptions: what arrives goes into the buffer, or is refused by name."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from pi05_ros.nodes.assembly import ImageType
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    JOINT_QOS,
    serialized_stamp_s,
    to_seconds,
)
from pi05_ros.nodes.parameters import CameraParameters
from pi05_ros.nodes.qos_watch import QosWatch
from pi05_ros.observation.buffer import ObservationBuffer
from pi05_ros.observation.decode import DecodeError, decode_joint_state

IMAGE_TYPES: dict[str, ImageType] = {"raw": Image, "compressed": CompressedImage}
REFUSAL_SHOWN_S = 1.0
"""How long the last refused joint state is a problem."""


class Inputs:
    """Subscribes to cameras, joint states and the instruction."""

    def __init__(
        self,
        node: Node,
        buffer: ObservationBuffer,
        cameras: Mapping[str, CameraParameters],
        watch: QosWatch,
        on_instruction: Callable[[String], None],
    ) -> None:
        self.refused_joint_states = 0
        self.refused_frames = 0
        self._node = node
        self._buffer = buffer
        self._watch = watch
        self._subscriptions: list[Any] = []
        self._refusal = ""
        self._refused_s = float("-inf")
        for name, camera in cameras.items():
            topic = camera.topic or f"{name}/image_raw"
            image_type = IMAGE_TYPES[camera.transport]
            self._subscribe(
                image_type,
                topic if camera.transport == "raw" else f"{topic}/compressed",
                functools.partial(self._on_image, name, image_type),
                IMAGE_QOS,
                raw=True,  # stored as it came: a frame that no inference uses is never converted
            )
        self._subscribe(JointState, "joint_states", self._on_joint_state, JOINT_QOS)
        self._subscribe(String, "instruction", on_instruction, INSTRUCTION_QOS)

    def problems(self) -> list[str]:
        """Why the last joint state was refused, if that was just now."""
        recent = time.monotonic() - self._refused_s < REFUSAL_SHOWN_S
        return [f"joint_states: {self._refusal}"] if recent else []

    def destroy(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe(
        self,
        message_type: type,
        topic: str,
        callback: Callable[..., None],
        qos: QoSProfile,
        raw: bool = False,
    ) -> None:
        self._subscriptions.append(
            self._node.create_subscription(
                message_type,
                topic,
                callback,
                qos,
                raw=raw,
                event_callbacks=self._watch.subscription_events(topic),
            )
        )

    def _on_image(self, camera: str, image_type: ImageType, data: bytes) -> None:
        try:
            self._buffer.put_image(camera, serialized_stamp_s(data), (image_type, data))
        except ValueError as error:
            self.refused_frames += 1
            self._node.get_logger().warning(f"{camera}: {error}", throttle_duration_sec=1.0)

    def _on_joint_state(self, message: JointState) -> None:
        try:
            positions = decode_joint_state(message, self._buffer.joint_names)
        except DecodeError as error:
            self.refused_joint_states += 1
            self._refusal, self._refused_s = str(error), time.monotonic()
            self._node.get_logger().warning(f"joint_states: {error}", throttle_duration_sec=1.0)
            return
        self._buffer.put_joints(to_seconds(message.header.stamp), positions)
