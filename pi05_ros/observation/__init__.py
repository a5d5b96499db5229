"""Messages become observations: decoding, freshness and skew gates. Free of ROS."""

from pi05_ros.observation.buffer import CameraStream, Gates, NotReady, ObservationBuffer, Snapshot
from pi05_ros.observation.decode import (
    DecodeError,
    decode_image,
    decode_joint_state,
    image_converter,
    stamp_s,
)
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.observation.stream import StreamStatistics

__all__ = [
    "CameraStream",
    "DecodeError",
    "Gates",
    "InstructionError",
    "NotReady",
    "ObservationBuffer",
    "Snapshot",
    "StreamStatistics",
    "decode_image",
    "decode_joint_state",
    "image_converter",
    "stamp_s",
]
