"""Writes LeRobot v3.0 data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_lab.data import images as image_files
from pi05_lab.data import lerobot_format as layout
from pi05_lab.data import parquet
from pi05_lab.data.lerobot_format import IMAGE_PREFIX, DatasetError, Features, is_image
from pi05_lab.data.statistics import ImageHistogram, vector_statistics
from pi05_lab.data.video import VideoWriter, video_info
from pi05_lab.files import atomic_file, atomic_folder
from pi05_ros.types import ImageArray

Image = ImageArray | bytes
"""RGB [height, width, 3], or the content of a PNG or JPEG file, which is stored unchanged."""

JOURNAL = "unfinished.json"
"""What an unfinished data set has so far."""
SAMPLED_IMAGES = 8
"""At most this many images of each camera and episode enter the statistics."""


class _ImageSample:
    """A few images, evenly spaced over an episode of unknown length."""

    def __init__(self) -> None:
        self.images: list[Image] = []
        self._stride = 1
        self._seen = 0

    def add(self, image: Image) -> None:
        if self._seen % self._stride == 0:
            self.images.append(image)
            if len(self.images) > SAMPLED_IMAGES:
                self.images = self.images[::2]
                self._stride *= 2
        self._seen += 1


class _Episode:
    """The frames of the episode that is being recorded."""

    def __init__(self, features: Features) -> None:
        self.tasks: list[str] = []
        self.vectors: dict[str, list[NDArray[Any]]] = {key: [] for key in features.vectors()}
        self.samples = {camera: _ImageSample() for camera in features.cameras}
        self.images: dict[str, list[Image]] = {camera: [] for camera in features.cameras}
        """By camera: all encoded images, or with video, which is written at once, the newest."""
        self.video_row: dict[str, Any] = {}


class DatasetWriter:
    """Records episodes into a folder that appears, complete, at the end of the `with` block.

    After an exception nothing remains; with `resume` what was committed does.

    Args:
        root: the folder to make, which must not exist.
        fps: frames per second of every episode, a whole number.
        features: the content of a frame.
        robot_type: free text for info.json.
        resume: continue an unfinished data set, from its last `commit`.
    """

    def __init__(
        self,
        root: Path | str,
        fps: int,
        features: Features,
        robot_type: str = "aloha",
        resume: bool = False,
    ) -> None:
        if int(fps) != fps or fps < 1:
            raise DatasetError(f"fps must be a positive whole number, got {fps}")
        self._fps = int(fps)
        self._features = features
        self._robot_type = robot_type
        self._schema = parquet.data_schema(features)
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(atomic_folder(Path(root), resume=resume))
        self._clear()
        if resume:
            self._restore()
        self._stack.callback(self._close_files)

    def _clear(self) -> None:
        cameras = self._features.cameras
        self.frames = 0
        """Of the episodes that have ended."""
        self.committed: list[str] = []
        """Labels of the parts that were committed."""
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._episode = _Episode(self._features)
        self._videos: dict[str, VideoWriter] = {}
        self._video_file = dict.fromkeys(cameras, (0, 0))
        self._histograms = {camera: ImageHistogram() for camera in cameras}
        self._data = parquet.DataFiles(self._folder, self._schema)

    def add_frame(
        self,
        images: Mapping[str, Image] | None,
        state: ArrayLike,
        action: ArrayLike,
        task: str,
        extra: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Add a frame to the current episode.

        Args:
            images: camera name → image; None for the images of the previous frame. Consecutive
                frames with the same images store them once (not as video).
            state: [state_dim] in the policy's units.
            action: [action_dim], the command executed from this frame to the next.
            task: the instruction.
            extra: every extra feature's value.

        Raises:
            DatasetError: a camera, value or feature is missing, unknown, of another shape or not
                finite. The frame is not added.
        """
        values = {layout.STATE_KEY: state, layout.ACTION_KEY: action, **(extra or {})}
        vectors = self._features.vectors()
        _check_names("feature", set(values), set(vectors))
        if not task.strip():
            raise DatasetError(f"a frame needs an instruction, got {task!r}")
        arrays: dict[str, NDArray[Any]] = {}
        for key, value in values.items():
            feature = vectors[key]
            array = arrays[key] = np.array(value, dtype=feature.dtype)
            if array.shape != tuple(feature.shape):
                raise DatasetError(f"{key!r} must have shape {feature.shape}, got {array.shape}")
            if not np.isfinite(array).all():
                raise DatasetError(f"{key!r} is not finite: {array}")
        for camera, image in self._checked_images(images).items():
            if not isinstance(image, bytes):
                self._write_video(camera, image)
                self._episode.images[camera].clear()
            self._episode.images[camera].append(image)
            self._episode.samples[camera].add(image)
        for key, array in arrays.items():
            self._episode.vectors[key].append(array)
        self._episode.tasks.append(task)

    def _checked_images(self, images: Mapping[str, Image] | None) -> dict[str, Image]:
        """As they are stored: encoded, or for a video decoded."""
        cameras, use_video = self._features.cameras, self._features.use_video
        if images is None:
            if cameras and not self._episode.tasks:
                raise DatasetError("the first frame of an episode needs images")
            return {camera: kept[-1] for camera, kept in self._episode.images.items()}
        _check_names("camera", set(images), set(cameras))
        checked: dict[str, Image] = {}
        for camera, image in images.items():
            if isinstance(image, bytes) and not use_video:
                checked[camera] = image
                continue
            # Copied, because a renderer may reuse its buffer.
            array = image_files.decode(image) if isinstance(image, bytes) else image.copy()
            expected = (*cameras[camera], 3)
            if array.dtype != np.uint8 or array.shape != expected:
                raise DatasetError(
                    f"camera {camera!r} needs uint8 RGB {expected}, got {array.dtype} {array.shape}"
                )
            checked[camera] = array if use_video else image_files.encode(array)
        return checked

    def end_episode(self) -> None:
        """Write the current episode; DatasetError if it has no frames."""
        episode, self._episode = self._episode, _Episode(self._features)
        length = len(episode.tasks)
        if not length:
            raise DatasetError("an episode needs at least one frame")
        number, first = len(self._episodes), self.frames
        tasks = [self._tasks.setdefault(task, len(self._tasks)) for task in episode.tasks]
        columns: dict[str, NDArray[Any]] = {
            **{key: np.stack(values) for key, values in episode.vectors.items()},
            "timestamp": (np.arange(length) / self._fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(first, first + length),
            "task_index": np.array(tasks),
        }
        chunk, file = self._data.append(parquet.data_table(self._schema, columns, episode.images))
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(episode.tasks)),
            "length": length,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            **episode.video_row,
        }
        for camera, video in self._videos.items():
            row[f"videos/{IMAGE_PREFIX}{camera}/to_timestamp"] = video.frames / self._fps
        statistics = {key: vector_statistics(values) for key, values in columns.items()}
        for camera, sample in episode.samples.items():
            histogram = ImageHistogram()
            for image in sample.images:
                histogram.add(image_files.decode(image) if isinstance(image, bytes) else image)
            self._histograms[camera].merge(histogram)
            statistics[IMAGE_PREFIX + camera] = histogram.statistics()
        for key, found in statistics.items():
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in found.items()}
        self._episodes.append(row)
        self.frames += length

    def _write_video(self, camera: str, image: ImageArray) -> None:
        key = IMAGE_PREFIX + camera
        starts = not self._episode.tasks
        video = self._videos.get(camera)
        if video is not None and starts and video.bytes > layout.VIDEO_FILE_MB << 20:
            video.close()
            self._video_file[camera] = layout.next_file(*self._video_file[camera])
            video = None
        place = dict(zip(("chunk_index", "file_index"), self._video_file[camera], strict=True))
        if video is None:
            path = self._folder / layout.VIDEO_PATH.format(video_key=key, **place)
            video = VideoWriter(path, self._fps, self._features.cameras[camera])
            self._videos[camera] = video
        if starts:
            start = {**place, "from_timestamp": video.frames / self._fps}
            named = {f"videos/{key}/{name}": value for name, value in start.items()}
            self._episode.video_row |= named
        video.write(image, keyframe=starts)

    def commit(self, label: str) -> None:
        """Keep all episodes that have ended even if the process is killed from here on."""
        if self._episode.tasks:
            raise DatasetError(f"{len(self._episode.tasks)} frames lack end_episode()")
        self._data.end_file()
        for camera, video in self._videos.items():
            video.close()
            self._video_file[camera] = layout.next_file(*self._video_file[camera])
        self._videos = {}
        self.committed.append(label)
        document = {
            "settings": self._settings(),
            "committed": self.committed,
            "episodes": self._episodes,
            "tasks": self._tasks,
            "frames": self.frames,
            "histograms": {name: h.to_json() for name, h in self._histograms.items()},
            "data_place": self._data.place,
            "data_files": [str(path.relative_to(self._folder)) for path in self._data.paths],
            "video_places": self._video_file,
        }
        with atomic_file(self._folder / JOURNAL) as path, path.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())

    def rollback(self) -> None:
        """Forget everything since the last `commit`."""
        self._close_files()
        self._clear()
        self._restore()

    def _settings(self) -> dict[str, Any]:
        settings = {"fps": self._fps, "robot_type": self._robot_type}
        plain: dict[str, Any] = json.loads(
            json.dumps(settings | {"features": self._features.as_info()})
        )
        return plain

    def _restore(self) -> None:
        """Continue after the last commit, and remove what came after it."""
        document = read_journal(self._folder)
        if document is None:
            kept: set[str] = set()
        else:
            if document["settings"] != self._settings():
                raise DatasetError(
                    f"{self._folder} is of an unfinished data set with other features or another "
                    "rate; remove it, or give the same options"
                )
            self.committed = document["committed"]
            self._episodes, self._tasks = document["episodes"], document["tasks"]
            self.frames = document["frames"]
            for camera, histogram in document["histograms"].items():
                self._histograms[camera] = ImageHistogram.from_json(histogram)
            self._data.place = tuple(document["data_place"])
            self._data.paths = [self._folder / name for name in document["data_files"]]
            self._video_file = {c: tuple(place) for c, place in document["video_places"].items()}
            kept = {str(path) for path in self._data.paths} | set(self._video_paths())
        for path in (*self._folder.glob("data/*/*"), *self._folder.glob("videos/*/*/*")):
            if str(path) not in kept:
                path.unlink()

    def _video_paths(self) -> Iterator[str]:
        """The videos of the episodes."""
        for row in self._episodes if self._features.use_video else ():
            for camera in self._features.cameras:
                key = IMAGE_PREFIX + camera
                place = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index")}
                yield str(self._folder / layout.VIDEO_PATH.format(video_key=key, **place))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, *rest)
            return
        with self._stack:
            self._finish()

    def _finish(self) -> None:
        if self._episode.tasks:
            raise DatasetError(f"the last {len(self._episode.tasks)} frames lack end_episode()")
        if not self._episodes:
            raise DatasetError("no episode was recorded")
        self._data.flush()
        self._close_files()
        features, paths = self._features.as_info(), self._data.paths
        statistics = {
            key: vector_statistics(parquet.read_column(paths, key, tuple(feature["shape"])))
            for key, feature in features.items()
            if not is_image(feature)
        }
        for camera, histogram in self._histograms.items():
            statistics[IMAGE_PREFIX + camera] = histogram.statistics()
        parquet.write_tasks(self._folder / layout.TASKS_PATH, list(self._tasks))
        episodes_path = layout.EPISODES_PATH.format(chunk_index=0, file_index=0)
        parquet.write_episodes(self._folder / episodes_path, self._episodes)
        stats = {
            key: {name: value.tolist() for name, value in found.items()}
            for key, found in statistics.items()
        }
        self._write_json(layout.STATS_PATH, stats)
        if self._features.use_video:
            for camera, size in self._features.cameras.items():
                features[IMAGE_PREFIX + camera]["info"] = video_info(self._fps, size)
        info = {
            "codebase_version": layout.VERSION,
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self.frames,
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
        self._write_json(layout.INFO_PATH, info)
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def _write_json(self, path: str, content: Any) -> None:
        text = json.dumps(content, indent=4) + "\n"
        (self._folder / path).write_text(text, encoding="utf-8")

    def _close_files(self) -> None:
        self._data.close()
        for video in self._videos.values():
            video.close()
        self._videos = {}


def read_journal(folder: Path) -> dict[str, Any] | None:
    """What was last committed into the folder of an unfinished data set; None: nothing."""
    try:
        document: dict[str, Any] = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DatasetError(f"{folder / JOURNAL} is damaged ({error}); remove {folder}") from None
    return document


def _check_names(what: str, given: set[str], expected: set[str]) -> None:
    problems = []
    if expected - given:
        problems.append(f"{what} {sorted(expected - given)} is missing")
    if given - expected:
        problems.append(f"{what} {sorted(given - expected)} is not one of the data set's")
    if problems:
        raise DatasetError("; ".join(problems))
