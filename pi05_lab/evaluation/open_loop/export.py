"""The recorded topics and the predicted motion in one MCAP file, for Foxglove or PlotJuggler."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi05_lab.data.bags import BAG_VERSION
from pi05_lab.evaluation.open_loop.sources import (
    JOINT_GROUP_COMMAND,
    Event,
    Instruction,
    Joints,
    Picture,
)
from pi05_lab.evaluation.open_loop.topics import (
    COMMAND_TYPES,
    COMPRESSED_IMAGE,
    JOINT_STATE,
    STRING,
    EvaluatedRobot,
)
from pi05_ros.types import FloatArray, ImageArray

PREDICTED = "/predicted"
"""`/predicted/chunk` and `/predicted/joint_states` are the first policy's and scheduler's; others
are below `/predicted/<policy>` and `/predicted/<policy>/<scheduler>`."""
RECORDED_JOINTS = "/recorded/joint_states"
"""Measured positions in the order of the params file, as the predicted ones."""
_TRAJECTORY = COMMAND_TYPES["joint_trajectory"]
_JPEG_QUALITY = 85


class FoxgloveFile:
    """A `Sink` that writes an MCAP file.

    Args:
        path: of the file; an older one is replaced when this one is whole.
        robot: names of joints and topics.
    """

    def __init__(self, path: Path, robot: EvaluatedRobot) -> None:
        self._path = path
        self._robot = robot
        self._names = list(robot.config.joints.names)
        self._types = get_typestore(Stores.ROS2_HUMBLE)
        kind = COMMAND_TYPES["interbotix"]
        self._types.register(get_types_from_msg(JOINT_GROUP_COMMAND, kind))
        self._connections: dict[str, Any] = {}
        self._first: dict[str, tuple[str, ...]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        self._writer = Writer(
            self._folder / "bag", version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP
        )
        self._writer.open()

    def event(self, event: Event, decode: Callable[[Any], ImageArray]) -> None:
        """Copy a recorded message, or make one where there was none."""
        if event.raw is not None:
            self._write(event.topic, event.raw.kind, event.time_ns, event.raw.data)
        elif isinstance(event, Picture):
            self._picture(event, decode(event.payload))
        elif isinstance(event, Instruction):
            self._publish("/instruction", STRING, event.time_ns, data=event.text)
        if isinstance(event, Joints):
            self._joints(RECORDED_JOINTS, event.time_ns, event.positions)

    def chunk(self, policy: str, stamp_s: float, dt_s: float, positions: FloatArray) -> None:
        """A chunk [horizon, n_joints] as a trajectory."""
        empty = np.empty(0)
        points = [
            self._message(
                "trajectory_msgs/msg/JointTrajectoryPoint",
                positions=np.asarray(row),
                velocities=empty,
                accelerations=empty,
                effort=empty,
                time_from_start=self._time("Duration", round(k * dt_s * 1e9)),
            )
            for k, row in enumerate(positions)
        ]
        time_ns = round(stamp_s * 1e9)
        self._publish(
            self._topic("chunk", policy),
            _TRAJECTORY,
            time_ns,
            header=self._header(time_ns),
            joint_names=self._names,
            points=points,
        )

    def commanded(self, policy: str, method: str, now_s: float, positions: FloatArray) -> None:
        """What a scheduler and the limits command at a tick."""
        topic = self._topic("joint_states", policy, method)
        self._joints(topic, round(now_s * 1e9), positions)

    def close(self, whole: bool) -> None:
        """Give the file its name, if it is whole."""
        self._writer.close()
        for file in (self._folder / "bag").glob("*.mcap"):
            if whole:
                file.replace(self._path)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _topic(self, what: str, *owner: str) -> str:
        if self._first.setdefault(what, owner) == owner:
            return f"{PREDICTED}/{what}"
        return "/".join([PREDICTED, *(re.sub(r"\W", "_", part) for part in owner), what])

    def _picture(self, event: Picture, picture: ImageArray) -> None:
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        data = cv2.imencode(".jpg", np.ascontiguousarray(picture[:, :, ::-1]), quality)[1]
        self._publish(
            f"/{event.camera}/image_raw/compressed",
            COMPRESSED_IMAGE,
            event.time_ns,
            header=self._header(event.time_ns, event.camera),
            format="jpeg",
            data=data.ravel(),
        )

    def _joints(self, topic: str, time_ns: int, positions: FloatArray) -> None:
        self._publish(
            topic,
            JOINT_STATE,
            time_ns,
            header=self._header(time_ns),
            name=self._names,
            position=np.asarray(positions, dtype=np.float64),
            velocity=np.empty(0),
            effort=np.empty(0),
        )

    def _time(self, kind: str, total_ns: int) -> Any:
        seconds, nanoseconds = divmod(total_ns, 1_000_000_000)
        return self._message(f"builtin_interfaces/msg/{kind}", sec=seconds, nanosec=nanoseconds)

    def _header(self, stamp_ns: int, frame_id: str = "") -> Any:
        stamp = self._time("Time", stamp_ns)
        return self._message("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)

    def _message(self, kind: str, **fields: Any) -> Any:
        return self._types.types[kind](**fields)

    def _publish(self, topic: str, kind: str, time_ns: int, **fields: Any) -> None:
        data = self._types.serialize_cdr(self._message(kind, **fields), kind)
        self._write(topic, kind, time_ns, data)

    def _write(self, topic: str, kind: str, time_ns: int, data: Any) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(
                topic, kind, typestore=self._types
            )
        self._writer.write(self._connections[topic], time_ns, data)
