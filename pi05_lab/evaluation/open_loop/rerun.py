"""The recording and the predicted motion as a Rerun file (.rrd)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pi05_lab.evaluation.open_loop.sources import Event, Instruction, Joints, Picture
from pi05_ros.types import FloatArray, ImageArray

TIMELINE = "recorded"
_PICTURE_PERIOD_S = 0.1


def rerun_library() -> Any:
    """Rerun's library; raises ImportError with the remedy if it is not there."""
    try:
        return importlib.import_module("rerun")
    except ImportError:
        raise ImportError("--rerun needs Rerun's library: pip install 'pi05_ros[rerun]'") from None


class RerunFile:
    """A `Sink` that writes an .rrd file.

    `joints/<name>/recorded` and `joints/<name>/<policy>_<scheduler>` are scalars, and
    `joints/<name>/<policy>_first_step` what each chunk begins with; `chunks/<policy>` has a line
    for each joint, the time ahead to the right in s, the position upwards.

    Args:
        path: of the file.
        name: of the recording.
        joint_names: of the robot.

    Raises:
        ImportError: Rerun's library is not installed.
    """

    def __init__(self, path: Path, name: str, joint_names: Sequence[str]) -> None:
        self._rerun = rerun = rerun_library()
        self._path = path
        self._names = list(joint_names)
        self._shown_s: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = rerun.RecordingStream("pi05_evaluate", recording_id=name)
        self._stream.save(str(path))

    def event(self, event: Event, decode: Callable[[Any], ImageArray]) -> None:
        self._stream.set_time(TIMELINE, timestamp=event.time_ns * 1e-9)
        if isinstance(event, Joints):
            for name, value in zip(self._names, event.positions, strict=True):
                self._scalar(f"joints/{name}/recorded", value)
        elif isinstance(event, Instruction):
            self._stream.log("instruction", self._rerun.TextLog(event.text))
        elif isinstance(event, Picture):
            self._picture(event, decode)

    def chunk(self, policy: str, stamp_s: float, dt_s: float, positions: FloatArray) -> None:
        self._stream.set_time(TIMELINE, timestamp=stamp_s)
        for name, value in zip(self._names, positions[0], strict=True):
            self._scalar(f"joints/{name}/{policy}_first_step", value)
        ahead_s = dt_s * np.arange(len(positions))
        strips = [np.stack((ahead_s, -column), axis=1) for column in positions.T]
        lines = self._rerun.LineStrips2D(strips, labels=self._names)
        self._stream.log(f"chunks/{policy}", lines)

    def commanded(self, policy: str, method: str, now_s: float, positions: FloatArray) -> None:
        self._stream.set_time(TIMELINE, timestamp=now_s)
        for name, value in zip(self._names, positions, strict=True):
            self._scalar(f"joints/{name}/{policy}_{method}", value)

    def close(self, whole: bool) -> None:
        """Write what is still in memory, and take away a file that is not whole."""
        self._stream.flush()
        self._stream.disconnect()
        if not whole:
            self._path.unlink(missing_ok=True)

    def _scalar(self, entity: str, value: float) -> None:
        self._stream.log(entity, self._rerun.Scalars(float(value)))

    def _picture(self, event: Picture, decode: Callable[[Any], ImageArray]) -> None:
        if event.stamp_s - self._shown_s.get(event.camera, -np.inf) < _PICTURE_PERIOD_S - 1e-6:
            return
        try:
            picture = decode(event.payload)
        except ValueError:
            return
        self._shown_s[event.camera] = event.stamp_s
        data = cv2.imencode(".jpg", np.ascontiguousarray(picture[:, :, ::-1]))[1].tobytes()
        image = self._rerun.EncodedImage(contents=data, media_type="image/jpeg")
        self._stream.log(f"cameras/{event.camera}", image)
