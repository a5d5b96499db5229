"""Exports the recording and the predicted motion: an MCAP file for Foxglove, a Rerun file."""

from __future__ import annotations

import importlib
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pi05_lab.data.bags import BagWriter
from pi05_lab.data.recording import (
    JOINT_GROUP_COMMAND,
    CameraImage,
    Event,
    Instruction,
    Joints,
)
from pi05_lab.data.topics import COMMAND_TYPES, EvaluatedRobot
from pi05_ros.types import FloatArray, ImageArray

PREDICTED = "/predicted"
"""`/predicted/chunk` and `/predicted/joint_states` are of the first policy and scheduler; others
are below `/predicted/<policy>` and `/predicted/<policy>/<scheduler>`."""
RECORDED_JOINTS = "/recorded/joint_states"
"""Measured positions in the order of the params file, like the predicted ones."""
_JPEG_QUALITY = 85
TIMELINE = "recorded"
_IMAGE_PERIOD_S = 0.1


class FoxgloveFile:
    """A `Sink` that writes an MCAP file.

    Args:
        path: of the file; an older one is replaced when this one is complete.
        robot: names of joints and topics.
    """

    def __init__(self, path: Path, robot: EvaluatedRobot) -> None:
        self._path = path
        self._names = list(robot.config.joints.names)
        self._first: dict[str, tuple[str, ...]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        definitions = {COMMAND_TYPES["interbotix"]: JOINT_GROUP_COMMAND}
        self._bag = BagWriter(self._folder / "bag", definitions)

    def event(self, event: Event, decode: Callable[[Any], ImageArray]) -> None:
        """Copy a recorded message, or make one for an event of a data set."""
        if event.raw is not None:
            self._bag.write(event.topic, event.raw.kind, event.time_ns, event.raw.data)
        elif isinstance(event, CameraImage):
            topic = f"/{event.camera}/image_raw/compressed"
            image = decode(event.payload)
            self._bag.write_jpeg(topic, event.time_ns, event.camera, image, _JPEG_QUALITY)
        elif isinstance(event, Instruction):
            self._bag.write_text("/instruction", event.time_ns, event.text)
        if isinstance(event, Joints):
            self._bag.write_joints(RECORDED_JOINTS, event.time_ns, self._names, event.positions)

    def chunk(self, policy: str, stamp_s: float, dt_s: float, positions: FloatArray) -> None:
        """Write a chunk [horizon, n_joints] as a trajectory."""
        times_ns = [round(k * dt_s * 1e9) for k in range(len(positions))]
        topic = self._topic("chunk", policy)
        self._bag.write_trajectory(topic, round(stamp_s * 1e9), self._names, positions, times_ns)

    def commanded(self, policy: str, method: str, now_s: float, positions: FloatArray) -> None:
        """Write what a scheduler and the limits command at a tick."""
        topic = self._topic("joint_states", policy, method)
        self._bag.write_joints(topic, round(now_s * 1e9), self._names, positions)

    def close(self, whole: bool) -> None:
        """Move the file to its path, if it is complete."""
        self._bag.close()
        for file in (self._folder / "bag").glob("*.mcap"):
            if whole:
                file.replace(self._path)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _topic(self, what: str, *owner: str) -> str:
        if self._first.setdefault(what, owner) == owner:
            return f"{PREDICTED}/{what}"
        return "/".join([PREDICTED, *(re.sub(r"\W", "_", part) for part in owner), what])


def rerun_library() -> Any:
    """Rerun's library; raises ImportError with the remedy if it is not installed."""
    try:
        return importlib.import_module("rerun")
    except ImportError:
        raise ImportError("--rerun needs Rerun's library: pip install 'pi05_ros[rerun]'") from None


class RerunFile:
    """A `Sink` that writes an .rrd file for the recording `name`.

    Scalars: `joints/<name>/recorded`, `joints/<name>/<policy>_<scheduler>`, and the first step of
    each chunk as `joints/<name>/<policy>_first_step`. `chunks/<policy>` has a line per joint: time
    ahead in s to the right, position upwards.

    Raises:
        ImportError: Rerun's library is not installed.
    """

    def __init__(self, path: Path, name: str, joint_names: Sequence[str]) -> None:
        self._rerun = rerun_library()
        self._path, self._names = path, list(joint_names)
        self._shown_s: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._rerun.RecordingStream("pi05_evaluate", recording_id=name)
        self._stream.save(str(path))

    def event(self, event: Event, decode: Callable[[Any], ImageArray]) -> None:
        self._stream.set_time(TIMELINE, timestamp=event.time_ns * 1e-9)
        if isinstance(event, Joints):
            self._log_joints("recorded", event.positions)
        elif isinstance(event, Instruction):
            self._stream.log("instruction", self._rerun.TextLog(event.text))
        elif isinstance(event, CameraImage):
            self._log_image(event, decode)

    def chunk(self, policy: str, stamp_s: float, dt_s: float, positions: FloatArray) -> None:
        self._stream.set_time(TIMELINE, timestamp=stamp_s)
        self._log_joints(f"{policy}_first_step", positions[0])
        ahead_s = dt_s * np.arange(len(positions))
        strips = [np.stack((ahead_s, -column), axis=1) for column in positions.T]
        lines = self._rerun.LineStrips2D(strips, labels=self._names)
        self._stream.log(f"chunks/{policy}", lines)

    def commanded(self, policy: str, method: str, now_s: float, positions: FloatArray) -> None:
        self._stream.set_time(TIMELINE, timestamp=now_s)
        self._log_joints(f"{policy}_{method}", positions)

    def close(self, whole: bool) -> None:
        """Write the rest; remove an incomplete file."""
        self._stream.flush()
        self._stream.disconnect()
        if not whole:
            self._path.unlink(missing_ok=True)

    def _log_joints(self, what: str, positions: FloatArray) -> None:
        for name, value in zip(self._names, positions, strict=True):
            self._stream.log(f"joints/{name}/{what}", self._rerun.Scalars(float(value)))

    def _log_image(self, event: CameraImage, decode: Callable[[Any], ImageArray]) -> None:
        if event.stamp_s - self._shown_s.get(event.camera, -np.inf) < _IMAGE_PERIOD_S - 1e-6:
            return
        try:
            image = decode(event.payload)
        except ValueError:
            return
        self._shown_s[event.camera] = event.stamp_s
        data = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]))[1].tobytes()
        encoded = self._rerun.EncodedImage(contents=data, media_type="image/jpeg")
        self._stream.log(f"cameras/{event.camera}", encoded)
