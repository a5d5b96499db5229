"""Videos of a data set: many episodes in one mp4, frames by their time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.types import ImageArray

CODEC = "libx264"
CRF = 18
KEYFRAME_EVERY = 2
"""LeRobot's choice: a random frame takes at most two to decode."""
OPEN_VIDEOS = 24

_ERRORS = (av.FFmpegError, OSError)


class VideoWriter:
    """Appends frames to one mp4 (H.264, yuv420p), which is readable after `close`.

    `size` is (height, width) in pixels, both even. The file's folder is made.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        self._stream: Any = self._container.add_stream(CODEC, rate=fps)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        # With B-frames the first frame might start later than 0.
        self._stream.options = {"crf": str(CRF), "g": str(KEYFRAME_EVERY), "bf": "0"}
        self._stream.codec_context.time_base = Fraction(1, fps)
        self.frames = 0
        self.bytes = 0
        """Written so far."""

    def write(self, image: ImageArray, keyframe: bool = False) -> None:
        """Append one RGB frame [height, width, 3]; `keyframe` where an episode starts."""
        frame: Any = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = self.frames
        if keyframe:
            frame.pict_type = av.video.frame.PictureType.I
        self._mux(self._stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        self._mux(self._stream.encode(None))
        self._container.close()

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self.bytes += packet.size
            self._container.mux(packet)


def video_info(fps: int, size: tuple[int, int]) -> dict[str, Any]:
    """The `info` of a video feature in info.json."""
    height, width = size
    video = {"height": height, "width": width, "codec": "h264", "pix_fmt": "yuv420p", "fps": fps,
             "channels": 3, "g": KEYFRAME_EVERY, "crf": CRF}  # fmt: skip
    info: dict[str, Any] = {f"video.{key}": value for key, value in video.items()}
    return info | {"is_depth_map": False, "has_audio": False}


class VideoReader:
    """Frames of videos by time, with the last `OPEN_VIDEOS` files kept open."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type[VideoReader], tuple[()]]:
        """Open files are not pickled."""
        return VideoReader, ()

    def frame(self, path: Path, time_s: float, fps: float) -> ImageArray:
        """RGB [height, width, 3] of the frame nearest to `time_s` seconds.

        DatasetError if there is no file, no video, or no frame within half a frame of that time.
        """
        if os.getpid() != self._process:
            # A forked process shares the file positions with its parent: open the files again.
            self._reset()
        with self._lock:
            if path not in self._open:
                self._open[path] = _OpenVideo(path)
                if len(self._open) > OPEN_VIDEOS:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(path)
            return self._open[path].frame(time_s, 0.5 / fps)


class _OpenVideo:
    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise DatasetError(f"the video {path} is missing")
        try:
            self._container: Any = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (*_ERRORS, IndexError) as error:
            raise DatasetError(f"the video {path} cannot be read: {error}") from None
        # One frame at a time: frame threads would decode frames ahead that are not needed.
        self._stream.thread_type = "SLICE"
        self._stream.codec_context.thread_count = 1

    def frame(self, time_s: float, tolerance_s: float) -> ImageArray:
        time_base = float(self._stream.time_base)
        target = round(time_s / time_base)
        best = None
        try:
            self._container.seek(max(target, 0), stream=self._stream, backward=True)
            for frame in self._container.decode(self._stream):
                if frame.pts is None:
                    continue
                off_s = abs(frame.pts * time_base - time_s)
                if best is None or off_s < best[0]:
                    best = off_s, frame
                if frame.pts >= target - tolerance_s / time_base:
                    break
        except _ERRORS as error:
            raise DatasetError(
                f"the video {self._path} is damaged at {time_s:.3f} s: {error}"
            ) from None
        if best is None or best[0] > tolerance_s:
            raise DatasetError(f"the video {self._path} has no frame at {time_s:.3f} s")
        return np.ascontiguousarray(best[1].to_ndarray(format="rgb24"), dtype=np.uint8)

    def close(self) -> None:
        self._container.close()
