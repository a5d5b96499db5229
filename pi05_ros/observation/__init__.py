"""Messages become observations: decoding, freshness and skew gates. Free of ROS."""

from pi05_ros.observation.buffer import (
    CameraStream,
    Gates,
    InstructionError,
    NotReady,
    ObservationBuffer,
    Snapshot,
)
from pi05_ros.observation.decode import (
    DecodeError,
    decode_image,
    decode_joint_state,
    image_converter,
    stamp_s,
)
from pi05_ros.observation.stream import CameraStatistics

__all__ = [
    "CameraStatistics",
    "CameraStream",
    "DecodeError",
    "Gates",
    "InstructionError",
    "NotReady",
    "ObservationBuffer",
    "Snapshot",
    "decode_image",
    "decode_joint_state",
    "image_converter",
    "stamp_s",
]
