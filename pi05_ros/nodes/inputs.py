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

from pi05_ros.config import CameraParameters
from pi05_ros.nodes.assembly import ImageType
from pi05_ros.nodes.graph_watch import QosWatch
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    JOINT_QOS,
    STAMP_END_BYTES,
    deserialized,
    serialized_stamp_s,
    to_seconds,
)
from pi05_ros.observation.buffer import ObservationBuffer
from pi05_ros.observation.decode import decode_joint_state

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
        on_frame: Callable[[], None],
    ) -> None:
        self.refused_joint_states = 0
        self.refused_frames = 0
        self._node = node
        self._buffer = buffer
        self._watch = watch
        self._on_frame = on_frame
        self._on_instruction = on_instruction
        self._subscriptions: list[Any] = []
        self._refusal = ""
        self._refused_s = float("-inf")
        for name, camera in cameras.items():
            image_type = IMAGE_TYPES[camera.transport]
            self._subscribe(
                image_type,
                camera.topic_of(name),
                functools.partial(self._on_image, name, image_type),
                IMAGE_QOS,
            )
        self._subscribe(JointState, "joint_states", self._on_joint_state, JOINT_QOS)
        self._subscribe(String, "instruction", self._on_string, INSTRUCTION_QOS)

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
    ) -> None:
        """Raw, so that a frame that no inference uses is never converted and bytes that are no
        message are refused here, not in rclpy.
        """
        self._subscriptions.append(
            self._node.create_subscription(
                message_type,
                topic,
                callback,
                qos,
                raw=True,
                event_callbacks=self._watch.subscription_events(topic),
            )
        )

    def _on_image(self, camera: str, image_type: ImageType, data: bytes) -> None:
        try:
            stamp_s = serialized_stamp_s(data)
            content = memoryview(data)[STAMP_END_BYTES:]
            self._buffer.put_image(camera, stamp_s, (image_type, data), content)
        except ValueError as error:
            self.refused_frames += 1
            self._node.get_logger().warning(f"{camera}: {error}", throttle_duration_sec=1.0)
            return
        self._on_frame()

    def _on_string(self, data: bytes) -> None:
        try:
            message = deserialized(data, String)
        except ValueError as error:
            self._node.get_logger().warning(f"instruction: {error}", throttle_duration_sec=1.0)
            return
        self._on_instruction(message)

    def _on_joint_state(self, data: bytes) -> None:
        try:
            message = deserialized(data, JointState)
            positions = decode_joint_state(message, self._buffer.joint_names)
        except ValueError as error:
            self.refused_joint_states += 1
            self._refusal, self._refused_s = str(error), time.monotonic()
            self._node.get_logger().warning(f"joint_states: {error}", throttle_duration_sec=1.0)
            return
        self._buffer.put_joints(to_seconds(message.header.stamp), positions)
