"""The LeRobot data set format v3.0: paths, keys, features and the `meta` folder.

Source: LeRobot 0.4–0.6, `src/lerobot/datasets`: `utils.py`, `feature_utils.py`,
`dataset_metadata.py`, `dataset_writer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"meta/episodes/{CHUNK_FILE}.parquet"
DATA_PATH = f"data/{CHUNK_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
CONVERTER = "lerobot.scripts.convert_dataset_v21_to_v30"

STATE_KEY = "observation.state"
ACTION_KEY = "action"
IMAGE_PREFIX = "observation.images."
CHUNK_KEY = "expert.action_chunk"
"""[horizon, action_dim] an expert's actions from this frame on. Not part of LeRobot, which takes
every feature whose name begins with `action` for an action."""
OLD_CHUNK_KEY = "action_chunk"
"""Its name in data of earlier versions."""
CUBES_KEY = "scene.cube_positions"
"""[3 × cubes] x, y, z of each cube's centre, m. Outside `observation`, because LeRobot's policies
take what is in it for a measurement of the robot."""
PIXELS_KEY = "scene.cube_pixels"
"""[cameras × cubes × 2] column and row of each cube in each camera's image, from 0 to 1; -1 where
the camera does not see it."""
PICTURE_KEY = "picture_index"
"""Frames with the same number have the same images."""

INDEX_FEATURES: dict[str, dict[str, Any]] = {
    key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")
}
"""Features of every frame; `timestamp` in seconds from the episode's start."""


class DatasetError(ValueError):
    """A data set that cannot be read, or data that it cannot hold; one line with the reason."""


@dataclass(frozen=True)
class Extra:
    """A further number, vector or array of every frame.

    Args:
        shape: of one frame's value, at least one dimension.
        dtype: NumPy name of a bool, integer or float type.
        names: of the entries of a vector.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Features:
    """The content of a frame, besides the indices.

    Args:
        cameras: camera name → (height, width) in pixels.
        state_names: entries of `observation.state`.
        action_names: entries of `action`.
        extras: feature key → description.
        use_video: images as video, else as image files inside the data.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_names: Sequence[str]
    action_names: Sequence[str]
    extras: Mapping[str, Extra] = field(default_factory=dict)
    use_video: bool = False

    def __post_init__(self) -> None:
        for names in (self.state_names, self.action_names):
            if not names:
                raise DatasetError("a data set needs the names of the state's and action's entries")
            if len(set(names)) != len(names):
                raise DatasetError(f"names must be given once each, got {list(names)}")
        reserved = {*INDEX_FEATURES, STATE_KEY, ACTION_KEY, "task", "size"}
        for key, extra in self.extras.items():
            if key in reserved or key.startswith(IMAGE_PREFIX) or "/" in key:
                raise DatasetError(f"an extra feature cannot be called {key!r}")
            if not extra.shape or min(extra.shape) < 1:
                raise DatasetError(f"extra feature {key!r} needs at least one entry: {extra.shape}")
            if np.dtype(extra.dtype).kind not in "biuf":
                raise DatasetError(f"extra feature {key!r} cannot be of type {extra.dtype!r}")
        for camera, size in self.cameras.items():
            if "/" in camera or not camera or min(size) < 1:
                raise DatasetError(f"camera {camera!r} with images of {size} cannot be recorded")
            if self.use_video and any(side % 2 for side in size):
                raise DatasetError(
                    f"camera {camera!r}: video (yuv420p) needs even sizes, got {size}; record "
                    "images instead"
                )

    def vectors(self) -> dict[str, Extra]:
        """State, action and extras by feature key."""
        named = {STATE_KEY: self.state_names, ACTION_KEY: self.action_names}
        return {key: Extra((len(n),), names=n) for key, n in named.items()} | {**self.extras}

    def as_info(self) -> dict[str, dict[str, Any]]:
        """The `features` of info.json."""
        info: dict[str, dict[str, Any]] = {}
        for key, extra in self.vectors().items():
            names = None if extra.names is None else list(extra.names)
            info[key] = {"dtype": extra.dtype, "shape": list(extra.shape), "names": names}
        dtype, names = "video" if self.use_video else "image", ["height", "width", "channels"]
        for camera, size in self.cameras.items():
            info[IMAGE_PREFIX + camera] = {"dtype": dtype, "shape": [*size, 3], "names": names}
        return {**info, **INDEX_FEATURES}


def is_image(feature: Mapping[str, Any]) -> bool:
    """Whether a feature of info.json is a camera's, as images or as video."""
    return feature["dtype"] in ("image", "video")


def flat_names(names: Any, size: int, prefix: str) -> list[str]:
    """Entry names as a list; older data sets have them in a dictionary, or not at all."""
    if isinstance(names, Mapping):
        values = [v for value in names.values() for v in (value if isinstance(value, list) else ())]
        names = values or list(names)
    if isinstance(names, (list, tuple)) and len(names) == size:
        return [str(name) for name in names]
    return [f"{prefix}_{k}" for k in range(size)]


def camera_name(key: str) -> str:
    """`observation.images.cam_high` → `cam_high`."""
    return key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")


def next_file(chunk_index: int, file_index: int) -> tuple[int, int]:
    """The chunk and file after this one."""
    full = file_index + 1 >= FILES_PER_CHUNK
    return (chunk_index + 1, 0) if full else (chunk_index, file_index + 1)


class Metadata:
    """info.json, tasks.parquet and the table of episodes; DatasetError if they are damaged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path, tasks = root / INFO_PATH, root / TASKS_PATH
        if not path.is_file():
            raise DatasetError(f"{root} is not a LeRobot data set: {INFO_PATH} is missing")
        info = _load_json(path)
        version = str(info.get("codebase_version", ""))
        if version.startswith(("v1.", "v2.", "2.")):
            raise DatasetError(
                f"{root} has LeRobot's format {version}; convert it to {VERSION}: "
                f"python -m {CONVERTER} --repo-id=NAME --root={root} --push-to-hub=false"
            )
        if not version.startswith(("v3.", "3.")):
            raise DatasetError(f"{root} has LeRobot's format {version!r}, which is not {VERSION}")
        try:
            self.fps = float(info["fps"])
            self.features = {key: _feature(key, value) for key, value in info["features"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(f"{path} lacks or garbles {error}") from None
        if not self.fps > 0:
            raise DatasetError(f"{path}: fps must be > 0, got {self.fps:g}")
        if not tasks.is_file() and info.get("total_tasks", 1):
            raise DatasetError(f"{tasks} is missing; without it the instructions are unknown")
        self.tasks = read_tasks(tasks) if tasks.is_file() else {}
        self.robot_type = str(info.get("robot_type") or "")
        images = [key for key, value in self.features.items() if is_image(value)]
        self.cameras = {camera_name(k): k for k in images if not _is_depth(self.features[k])}
        """Camera name → feature key; without depth maps."""
        self._data_path = info.get("data_path") or DATA_PATH
        self._video_path = info.get("video_path") or VIDEO_PATH
        self._episodes: dict[int, dict[str, Any]] = {}
        for file in sorted((root / "meta/episodes").glob("*/*.parquet")):
            with _named_errors(file):
                names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
                rows = pq.read_table(file, columns=names, partitioning=None).to_pylist()
                self._episodes |= {int(row["episode_index"]): row for row in rows}
        counted = sum(int(row["length"]) for row in self._episodes.values())
        self.total_frames = int(info.get("total_frames", counted))

    def names(self, key: str) -> list[str]:
        """The names of a vector's entries."""
        feature = self.features[key]
        return flat_names(feature.get("names"), int(np.prod(feature["shape"])), key)

    def misplaced(self, key: str, expected: Sequence[str]) -> str:
        """What is wrong with the order of a vector's entries; empty if nothing.

        Of names that only one side has, such as `motor_0`, the place counts.
        """
        names = self.names(key)
        for place, name in enumerate(expected):
            if name in names and names.index(name) != place:
                return f"{name!r} is number {names.index(name) + 1} instead of {place + 1}"
        return ""

    def image_size(self, key: str) -> tuple[int, int]:
        """(height, width) in pixels; the channels may come first or last in the shape."""
        shape: list[int] = self.features[key]["shape"]
        channels_first = shape[0] in (1, 3) and shape[-1] not in (1, 3)
        height, width = shape[1:3] if channels_first else shape[:2]
        return height, width

    def data_files(self) -> list[Path]:
        """The data files in the order of their frames; DatasetError if one is missing."""
        keys = ("chunk_index", "file_index")
        places = {tuple(row.get(f"data/{key}") for key in keys) for row in self._episodes.values()}
        files = [
            self.root / self._data_path.format(**dict(zip(keys, place, strict=True)))
            for place in sorted(place for place in places if None not in place)
        ] or sorted((self.root / "data").glob("*/*.parquet"))
        if not files:
            raise DatasetError(f"{self.root / 'data'} holds no parquet file")
        for path in files:
            if not path.is_file():
                raise DatasetError(f"{path} is missing; copy it there or record the data set again")
        return files

    def data_file(self, episode: int) -> Path:
        """The file of an episode's rows."""
        row = self._episodes.get(episode, {})
        place = {key: row.get(f"data/{key}", 0) for key in ("chunk_index", "file_index")}
        return self.root / self._data_path.format(**place)

    def video(self, episode: int, key: str) -> tuple[Path, float]:
        """The file of an episode's video, and the time in it at which the episode starts."""
        row = self._episodes.get(episode, {})
        try:
            place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            path = self.root / self._video_path.format(video_key=key, **place)
            return path, float(row[f"videos/{key}/from_timestamp"])
        except KeyError as error:
            raise DatasetError(
                f"{self.root / 'meta/episodes'} does not say where the video of episode {episode}, "
                f"camera {key!r}, is: {error.args[0]!r} is missing"
            ) from None


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a DatasetError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _load_json(path: Path) -> dict[str, Any]:
    with _named_errors(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a JSON object")
    return content


def _feature(key: str, value: dict[str, Any]) -> dict[str, Any]:
    shape = [int(size) for size in value["shape"]]
    if not shape:
        raise ValueError(f"the shape of {key!r}")
    return {**value, "dtype": str(value["dtype"]), "shape": shape}


def _is_depth(feature: dict[str, Any]) -> bool:
    infos = [feature.get(place) or {} for place in ("info", "video_info")]
    return any(info.get("is_depth_map") or info.get("video.is_depth_map") for info in infos)


def read_tasks(path: Path) -> dict[int, str]:
    """Task index → instruction; DatasetError if the file is not a table of tasks."""
    with _named_errors(path):
        table = pq.read_table(path, partitioning=None)
        indices = table.column("task_index").to_pylist()
        names = [name for name in table.column_names if name != "task_index"]
        return dict(zip(indices, table.column(names[0]).to_pylist(), strict=True))
