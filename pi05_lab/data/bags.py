"""Writes rosbag2 bags (MCAP) with the topics that the policy node reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.types import FloatArray, ImageArray

JOINT_STATES_TOPIC = "/joint_states"
INSTRUCTION_TOPIC = "/instruction"
INSTRUCTION_PERIOD_S = 1.0
"""The instruction is repeated, for a reader that starts in the middle."""
BAG_VERSION = 8
"""rosbag2's metadata.yaml of Humble to Kilted; 9 is Kilted's own."""


class SerializedBagWriter:
    """One bag of messages that are serialized already, as they came off the wire.

    Args:
        path: the bag's folder to make; it must not exist.

    Raises:
        FileExistsError: `path` is there already.
    """

    def __init__(self, path: Path | str) -> None:
        self._types = get_typestore(Stores.ROS2_HUMBLE)
        self._connections: dict[str, Any] = {}
        self._writer = _open(Path(path))

    def write(self, topic: str, kind: str, received_ns: int, data: bytes) -> None:
        """Write one message: CDR, of a type like "std_msgs/msg/String"."""
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(
                topic, kind, typestore=self._types
            )
        self._writer.write(self._connections[topic], received_ns, data)

    def close(self) -> None:
        """Write the index and metadata.yaml."""
        self._writer.close()


class BagWriter:
    """One bag: pictures, joint states, the instruction, and every controller's commands.

    Used as a context manager it closes at the end. Topics are `/<camera>/image_raw`,
    `/joint_states`, `/instruction` and `/<controller>/joint_trajectory`, as in `config/aloha.yaml`.

    Args:
        path: the bag's folder to make; it must not exist.
        joint_names: of all joints, in the order of every array that is written.
        controllers: controller → its joints.
        period_s: between two frames; a command is due one period after the frame.

    Raises:
        FileExistsError: `path` is there already.
        DatasetError: a controller has a joint that is not in `joint_names`.
    """

    def __init__(
        self,
        path: Path | str,
        joint_names: Sequence[str],
        controllers: Mapping[str, Sequence[str]],
        period_s: float,
    ) -> None:
        self._joint_names = list(joint_names)
        for name, joints in controllers.items():
            unknown = [joint for joint in joints if joint not in self._joint_names]
            if unknown:
                raise DatasetError(f"{name}: {unknown[0]!r} is none of {self._joint_names}")
        self._controllers = {
            name: (list(joints), [self._joint_names.index(joint) for joint in joints])
            for name, joints in controllers.items()
        }
        self._period_ns = round(period_s * 1e9)
        self._types = get_typestore(Stores.ROS2_HUMBLE)
        self._connections: dict[str, Any] = {}
        self._instruction = ""
        self._instruction_ns = 0
        self._writer = _open(Path(path))

    def write(
        self,
        stamp_s: float,
        images: Mapping[str, ImageArray],
        positions: FloatArray,
        velocities: FloatArray,
        targets: FloatArray,
        instruction: str,
    ) -> None:
        """Write one frame.

        Args:
            stamp_s: of the pictures and the joints.
            images: camera → RGB [height, width, 3].
            positions: [n_joints] measured, rad and m.
            velocities: [n_joints] measured, rad/s and m/s.
            targets: [n_joints] commanded, rad and m.
            instruction: published when it changes and every `INSTRUCTION_PERIOD_S`.
        """
        stamp_ns = round(stamp_s * 1e9)
        for values in (positions, velocities, targets):
            if len(values) != len(self._joint_names) or not np.isfinite(values).all():
                raise DatasetError(
                    f"{len(self._joint_names)} finite joint values are needed, got {values}"
                )
        since_ns = stamp_ns - self._instruction_ns
        if instruction != self._instruction or since_ns >= INSTRUCTION_PERIOD_S * 1e9:
            self._instruction, self._instruction_ns = instruction, stamp_ns
            self._publish(INSTRUCTION_TOPIC, stamp_ns, "std_msgs/msg/String", data=instruction)
        for camera, picture in images.items():
            self._publish_image(camera, picture, stamp_ns)
        self._publish(
            JOINT_STATES_TOPIC,
            stamp_ns,
            "sensor_msgs/msg/JointState",
            header=self._header(stamp_ns),
            name=self._joint_names,
            position=np.asarray(positions, dtype=np.float64),
            velocity=np.asarray(velocities, dtype=np.float64),
            effort=np.empty(0),
        )
        for controller in self._controllers:
            self._publish_command(controller, targets, stamp_ns)

    def _publish_image(self, camera: str, picture: ImageArray, stamp_ns: int) -> None:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise DatasetError(
                f"camera {camera!r} needs uint8 RGB [height, width, 3], got {picture.dtype} "
                f"{picture.shape}"
            )
        height, width = picture.shape[:2]
        self._publish(
            f"/{camera}/image_raw",
            stamp_ns,
            "sensor_msgs/msg/Image",
            header=self._header(stamp_ns, camera),
            height=height,
            width=width,
            encoding="rgb8",
            is_bigendian=0,
            step=3 * width,
            data=np.ascontiguousarray(picture).ravel(),
        )

    def _publish_command(self, controller: str, targets: FloatArray, stamp_ns: int) -> None:
        joints, columns = self._controllers[controller]
        point = self._message(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=np.asarray(targets, dtype=np.float64)[columns],
            velocities=np.empty(0),
            accelerations=np.empty(0),
            effort=np.empty(0),
            time_from_start=self._message(
                "builtin_interfaces/msg/Duration",
                sec=self._period_ns // 1_000_000_000,
                nanosec=self._period_ns % 1_000_000_000,
            ),
        )
        self._publish(
            f"/{controller}/joint_trajectory",
            stamp_ns,
            "trajectory_msgs/msg/JointTrajectory",
            header=self._header(stamp_ns),
            joint_names=joints,
            points=[point],
        )

    def _header(self, stamp_ns: int, frame_id: str = "") -> Any:
        stamp = self._message(
            "builtin_interfaces/msg/Time",
            sec=stamp_ns // 1_000_000_000,
            nanosec=stamp_ns % 1_000_000_000,
        )
        return self._message("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)

    def _message(self, kind: str, **fields: Any) -> Any:
        return self._types.types[kind](**fields)

    def _publish(self, topic: str, stamp_ns: int, kind: str, **fields: Any) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(
                topic, kind, typestore=self._types
            )
        data = self._types.serialize_cdr(self._message(kind, **fields), kind)
        self._writer.write(self._connections[topic], stamp_ns, data)

    def close(self) -> None:
        """Write the index and metadata.yaml."""
        self._writer.close()

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> Writer:
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
    writer.open()
    return writer
