"""Videos of a dataset: many episodes in one mp4, frames by their time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.types import ImageArray

CODEC = "libx264"
CRF = 18
KEYFRAME_EVERY = 2
"""LeRobot's own choice: a random frame costs at most two to decode."""
OPEN_VIDEOS = 24


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "videos need PyAV, which is not installed: pip install 'pi05_ros[train]'"
        ) from error
    return av


class VideoWriter:
    """Appends frames to one mp4 (H.264, yuv420p); `close` makes it readable.

    Args:
        path: of the file; its folder is made.
        fps: frames per second.
        size: (height, width) in pixels, both even.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int]) -> None:
        self._av = _av()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(path), "w")
        self._stream = self._container.add_stream(CODEC, rate=fps)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        # B-frames would let the first frame start later than 0
        self._stream.options = {"crf": str(CRF), "g": str(KEYFRAME_EVERY), "bf": "0"}
        self._stream.codec_context.time_base = Fraction(1, fps)
        self.frames = 0
        self.bytes = 0
        """Written so far."""

    def write(self, picture: ImageArray, keyframe: bool = False) -> None:
        """Append one RGB frame [height, width, 3]; `keyframe` where an episode starts."""
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = self.frames
        if keyframe:
            frame.pict_type = self._av.video.frame.PictureType.I
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
    return {
        "video.height": size[0],
        "video.width": size[1],
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.fps": fps,
        "video.channels": 3,
        "video.g": KEYFRAME_EVERY,
        "video.crf": CRF,
        "is_depth_map": False,
        "has_audio": False,
    }


class VideoReader:
    """Frames of videos by time, with the last `OPEN_VIDEOS` files kept open."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._reset()

    def frame(self, path: Path, time_s: float, fps: float) -> ImageArray:
        """RGB [height, width, 3] of the frame nearest to `time_s` seconds.

        Raises:
            DatasetError: no file, no video, or no frame within half a frame of that time.
        """
        if os.getpid() != self._process:
            # a forked worker must not move the file position under its parent
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
        av = _av()
        self._errors = (av.FFmpegError, OSError)
        if not path.is_file():
            raise DatasetError(f"the video {path} is missing")
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (*self._errors, IndexError) as error:
            raise DatasetError(f"the video {path} cannot be read: {error}") from None
        # one frame at a time: frame threads would decode ahead what nobody asked for
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
        except self._errors as error:
            raise DatasetError(
                f"the video {self._path} is damaged at {time_s:.3f} s: {error}"
            ) from None
        if best is None or best[0] > tolerance_s:
            raise DatasetError(f"the video {self._path} has no frame at {time_s:.3f} s")
        return np.ascontiguousarray(best[1].to_ndarray(format="rgb24"), dtype=np.uint8)

    def close(self) -> None:
        self._container.close()
