"""Subscriptions of the policy node: messages go into the buffer, or are refused by name."""

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
from pi05_ros.nodes.graph_checks import QosMonitor
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    JOINT_QOS,
    STAMP_END_BYTES,
    ImageType,
    deserialize,
    serialized_stamp_s,
    to_seconds,
)
from pi05_ros.observation.buffer import ObservationBuffer
from pi05_ros.observation.decode import decode_joint_state
from pi05_ros.types import Problem

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
        qos: QosMonitor,
        on_instruction: Callable[[str], None],
        on_frame: Callable[[], None],
    ) -> None:
        self.refused_joint_states = 0
        self._node = node
        self._buffer = buffer
        self._qos = qos
        self._on_frame = on_frame
        self._on_instruction = on_instruction
        self._subscriptions: list[Any] = []
        self._refusal = ""
        self._refused_s = float("-inf")
        for name, camera in cameras.items():
            image_type = IMAGE_TYPES[camera.transport]
            on_image = functools.partial(self._on_image, name, image_type)
            self._subscribe(image_type, camera.topic_of(name), on_image, IMAGE_QOS)
        self._subscribe(JointState, "joint_states", self._on_joint_state, JOINT_QOS)
        self._subscribe(String, "instruction", self._on_string, INSTRUCTION_QOS)

    def problems(self) -> list[Problem]:
        """The last refused joint state, for `REFUSAL_SHOWN_S`."""
        recent = time.monotonic() - self._refused_s < REFUSAL_SHOWN_S
        return [Problem("joints", f"joint_states: {self._refusal}")] if recent else []

    def destroy(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe(
        self, message_type: type, topic: str, callback: Callable[..., None], qos: QoSProfile
    ) -> None:
        # Raw: frames that no inference uses are never converted, and bytes that are no message are
        # refused here and not in rclpy, where they would end the process.
        events = self._qos.subscription_events(topic)
        subscription = self._node.create_subscription(
            message_type, topic, callback, qos, raw=True, event_callbacks=events
        )
        self._subscriptions.append(subscription)

    def _on_image(self, camera: str, image_type: ImageType, data: bytes) -> None:
        try:
            stamp_s = serialized_stamp_s(data)
            content = memoryview(data)[STAMP_END_BYTES:]
            self._buffer.put_image(camera, stamp_s, (image_type, data), content)
        except ValueError as error:
            # rclpy throttles by the line of the call: each input has its own
            self._node.get_logger().warning(f"{camera}: {error}", throttle_duration_sec=1.0)
            return
        self._on_frame()

    def _on_string(self, data: bytes) -> None:
        try:
            message = deserialize(data, String)
        except ValueError as error:
            self._node.get_logger().warning(f"instruction: {error}", throttle_duration_sec=1.0)
            return
        self._on_instruction(message.data)

    def _on_joint_state(self, data: bytes) -> None:
        try:
            message = deserialize(data, JointState)
            positions = decode_joint_state(message, self._buffer.joint_names)
        except ValueError as error:
            self.refused_joint_states += 1
            self._refusal, self._refused_s = str(error), time.monotonic()
            self._node.get_logger().warning(f"joint_states: {error}", throttle_duration_sec=1.0)
            return
        self._buffer.put_joints(to_seconds(message.header.stamp), positions)
