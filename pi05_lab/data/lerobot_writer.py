"""Writes LeRobot v3.0 datasets."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_lab.data import images as pictures
from pi05_lab.data import lerobot_format as layout
from pi05_lab.data import parquet as tables
from pi05_lab.data.lerobot_format import (
    DatasetError,
    Features,
    PictureHistogram,
    Statistics,
    vector_statistics,
)
from pi05_lab.data.video import VideoWriter, video_info
from pi05_ros.types import ImageArray

Picture = ImageArray | bytes
"""RGB [height, width, 3], or a PNG or JPEG file's content, which is stored as it is."""

SAMPLED_PICTURES = 8
"""At most so many of each camera and episode go into the statistics."""


class _Sample:
    """A few pictures, evenly spaced over an episode whose length is not known before its end."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self._stride = 1
        self._seen = 0

    def offer(self, picture: Picture) -> None:
        if self._seen % self._stride == 0:
            self.pictures.append(picture)
            if len(self.pictures) > SAMPLED_PICTURES:
                self.pictures = self.pictures[::2]
                self._stride *= 2
        self._seen += 1


@dataclass
class _Episode:
    """The frames of the episode that is being recorded."""

    vectors: dict[str, list[NDArray[Any]]]
    samples: dict[str, _Sample]
    pictures: dict[str, list[Picture]]
    """By camera; with video, which is written at once, the newest alone."""
    video_row: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tasks)


class DatasetWriter:
    """Records episodes into a folder that appears, complete, when `close` is called.

    Used as a context manager it closes at the end, and leaves nothing after an error.

    Args:
        root: the folder to make; it must not exist.
        fps: frames per second of every episode.
        features: what a frame holds.
        robot_type: free text for info.json.

    Raises:
        FileExistsError: `root` is there already.
        DatasetError: fps is not a positive whole number.
    """

    def __init__(
        self, root: Path | str, fps: int, features: Features, robot_type: str = "aloha"
    ) -> None:
        self.root = Path(root).absolute()
        if int(fps) != fps or fps < 1:
            raise DatasetError(f"fps must be a positive whole number, got {fps}")
        if self.root.exists():
            raise FileExistsError(f"{self.root} is there already; remove it or name another folder")
        self._fps = int(fps)
        self._features = features
        self._vectors = features.vectors()
        self._robot_type = robot_type
        self._schema = tables.data_schema(features)
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(
            tempfile.mkdtemp(prefix=f".{self.root.name}.", suffix=".partial", dir=self.root.parent)
        )
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0
        self._episode = self._empty_episode()
        self._data = tables.DataFiles(self._folder, self._schema)
        self._videos: dict[str, VideoWriter] = {}
        self._video_file = dict.fromkeys(features.cameras, (0, 0))
        self._histograms = {camera: PictureHistogram() for camera in features.cameras}
        self._closed = False

    def _empty_episode(self) -> _Episode:
        return _Episode(
            vectors={key: [] for key in self._vectors},
            samples={camera: _Sample() for camera in self._features.cameras},
            pictures={camera: [] for camera in self._features.cameras},
        )

    @property
    def episodes(self) -> int:
        return len(self._episodes)

    @property
    def frames(self) -> int:
        """Of the episodes that have ended."""
        return self._frames

    def add_frame(
        self,
        images: Mapping[str, Picture] | None,
        state: ArrayLike,
        action: ArrayLike,
        task: str,
        extra: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Add a frame to the running episode.

        Args:
            images: camera name → picture; None for the same pictures as the frame before, which
                then are stored once (as images) for all frames that follow each other so.
            state: [state_dim] in the policy's units.
            action: [action_dim], the command executed from this frame to the next.
            task: the instruction.
            extra: every extra feature's value.

        Raises:
            DatasetError: a camera, value or feature is missing, unknown, of another shape or not
                finite. The frame is not added.
        """
        values = {layout.STATE_KEY: state, layout.ACTION_KEY: action, **(extra or {})}
        if set(values) != set(self._vectors):
            raise DatasetError(_difference("feature", set(values), set(self._vectors)))
        if not isinstance(task, str) or not task.strip():
            raise DatasetError(f"a frame needs an instruction, got {task!r}")
        arrays = {key: self._checked(key, value) for key, value in values.items()}
        taken = self._checked_pictures(images)
        for camera, picture in taken.items():
            self._take_picture(camera, picture)
        for key, array in arrays.items():
            self._episode.vectors[key].append(array)
        self._episode.tasks.append(task)

    def _checked(self, key: str, value: ArrayLike) -> NDArray[Any]:
        feature = self._vectors[key]
        array = np.array(value, dtype=feature.dtype)
        if array.shape != tuple(feature.shape):
            raise DatasetError(f"{key!r} must have shape {feature.shape}, got {array.shape}")
        if not np.isfinite(array).all():
            raise DatasetError(f"{key!r} is not finite: {array}")
        return array

    def _checked_pictures(self, images: Mapping[str, Picture] | None) -> dict[str, Picture]:
        cameras = self._features.cameras
        if images is None:
            if cameras and not len(self._episode):
                raise DatasetError("the first frame of an episode needs pictures")
            return {camera: kept[-1] for camera, kept in self._episode.pictures.items()}
        if set(images) != set(cameras):
            raise DatasetError(_difference("camera", set(images), set(cameras)))
        taken: dict[str, Picture] = {}
        for camera, picture in images.items():
            if isinstance(picture, bytes) and not self._features.use_video:
                taken[camera] = picture
                continue
            if isinstance(picture, bytes):
                picture = pictures.decode(picture)
            array = np.asarray(picture)
            expected = (*cameras[camera], 3)
            if array.dtype != np.uint8 or array.shape != expected:
                raise DatasetError(
                    f"camera {camera!r} needs uint8 RGB {expected}, got {array.dtype} {array.shape}"
                )
            # a renderer may reuse its buffer
            taken[camera] = array.copy() if self._features.use_video else pictures.encode(array)
        return taken

    def _take_picture(self, camera: str, picture: Picture) -> None:
        kept = self._episode.pictures[camera]
        if not isinstance(picture, bytes):
            self._write_video(camera, picture)
            kept.clear()
        kept.append(picture)
        self._episode.samples[camera].offer(picture)

    def end_episode(self) -> None:
        """Write the running episode.

        Raises:
            DatasetError: it has no frames.
        """
        episode, self._episode = self._episode, self._empty_episode()
        length = len(episode)
        if not length:
            raise DatasetError("an episode needs at least one frame")
        number = len(self._episodes)
        columns: dict[str, NDArray[Any]] = {
            key: np.stack(values) for key, values in episode.vectors.items()
        }
        columns["timestamp"] = (np.arange(length) / self._fps).astype(np.float32)
        columns["frame_index"] = np.arange(length)
        columns["episode_index"] = np.full(length, number)
        columns["index"] = np.arange(self._frames, self._frames + length)
        columns["task_index"] = np.array(
            [self._tasks.setdefault(task, len(self._tasks)) for task in episode.tasks]
        )
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(episode.tasks)),
            "length": length,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + length,
        }
        encoded = {} if self._features.use_video else episode.pictures
        table = tables.data_table(self._schema, columns, encoded)
        row["data/chunk_index"], row["data/file_index"] = self._data.append(table)
        for camera, video in self._videos.items():
            key = f"videos/{layout.IMAGE_PREFIX}{camera}"
            row |= episode.video_row | {f"{key}/to_timestamp": video.frames / self._fps}
        statistics = {key: vector_statistics(values) for key, values in columns.items()}
        for camera, sample in episode.samples.items():
            statistics[layout.IMAGE_PREFIX + camera] = self._count_pictures(camera, sample)
        self._episodes.append(row | tables.flat_statistics(statistics))
        self._frames += length

    def _count_pictures(self, camera: str, sample: _Sample) -> Statistics:
        histogram = PictureHistogram()
        for picture in sample.pictures:
            histogram.add(pictures.decode(picture) if isinstance(picture, bytes) else picture)
        self._histograms[camera].merge(histogram)
        return histogram.statistics()

    def _write_video(self, camera: str, picture: ImageArray) -> None:
        starts = not len(self._episode)
        video = self._videos.get(camera)
        if video is not None and starts and video.bytes > layout.VIDEO_FILE_MB << 20:
            video.close()
            self._video_file[camera] = layout.next_file(*self._video_file[camera])
            video = None
        key = layout.IMAGE_PREFIX + camera
        chunk, file = self._video_file[camera]
        if video is None:
            path = self._file(layout.VIDEO_PATH, chunk, file, video_key=key)
            video = VideoWriter(path, self._fps, self._features.cameras[camera])
            self._videos[camera] = video
        if starts:
            self._episode.video_row |= {
                f"videos/{key}/chunk_index": chunk,
                f"videos/{key}/file_index": file,
                f"videos/{key}/from_timestamp": video.frames / self._fps,
            }
        video.write(picture, keyframe=starts)

    def _file(self, pattern: str, chunk: int, file: int, **names: str) -> Path:
        path = self._folder / pattern.format(chunk_index=chunk, file_index=file, **names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Write the statistics and the metadata and give the folder its name.

        Raises:
            DatasetError: no episode was recorded, or frames were added without `end_episode`.
        """
        if self._closed:
            return
        if len(self._episode):
            raise DatasetError(f"the last {len(self._episode)} frames lack end_episode()")
        if not self._episodes:
            raise DatasetError("no episode was recorded")
        self._data.close()
        for video in self._videos.values():
            video.close()
        self._videos = {}
        statistics = {
            key: vector_statistics(
                tables.read_column(self._data.paths, key, tuple(feature["shape"]))
            )
            for key, feature in self._features.as_info().items()
            if feature["dtype"] not in ("image", "video")
        }
        for camera, histogram in self._histograms.items():
            statistics[layout.IMAGE_PREFIX + camera] = histogram.statistics()
        self._write_json(layout.STATS_PATH, tables.nested_lists(statistics))
        tables.write_tasks(self._folder / layout.TASKS_PATH, list(self._tasks))
        tables.write_episodes(self._file(layout.EPISODES_PATH, 0, 0), self._episodes)
        self._write_json(layout.INFO_PATH, self._info())
        umask = os.umask(0)
        os.umask(umask)
        self._folder.chmod(0o777 & ~umask)
        self._folder.rename(self.root)
        self._closed = True

    def _info(self) -> dict[str, Any]:
        features = self._features.as_info()
        if self._features.use_video:
            for camera, size in self._features.cameras.items():
                features[layout.IMAGE_PREFIX + camera]["info"] = video_info(self._fps, size)
        return {
            "codebase_version": layout.VERSION,
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": layout.FILES_PER_CHUNK,
            "data_files_size_in_mb": layout.DATA_FILE_MB,
            "video_files_size_in_mb": layout.VIDEO_FILE_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": layout.DATA_PATH,
            "video_path": layout.VIDEO_PATH if self._features.use_video else None,
            "features": features,
        }

    def _write_json(self, path: str, content: Any) -> None:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")

    def discard(self) -> None:
        """Remove what was recorded; nothing to do after `close`."""
        if self._closed:
            return
        self._closed = True
        for video in self._videos.values():
            video.close()
        self._data.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()


def _difference(what: str, given: set[str], expected: set[str]) -> str:
    parts = [
        f"{what} {sorted(names)} {verb}"
        for verb, names in (
            ("is missing", expected - given),
            ("is not one of the dataset's", given - expected),
        )
        if names
    ]
    return "; ".join(parts)
