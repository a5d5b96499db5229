"""A dataset's `meta` folder: what it holds and in which files.

The LeRobot dataset format v3.0: paths, keys, features.

Source: LeRobot 0.4–0.6, `src/lerobot/datasets`: `utils.py`, `feature_utils.py`,
`dataset_metadata.py`, `dataset_writer.py`.


Exact statistics of vectors and of 8-bit pictures, as LeRobot's stats.json holds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

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

STATE_KEY = "observation.state"
ACTION_KEY = "action"
CHUNK_KEY = "action_chunk"
"""[horizon, action_dim] what an expert would do from this very frame on. Not part of LeRobot: its
policies train on `action` and take no notice of it."""
IMAGE_PREFIX = "observation.images."
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

INDEX_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""What every frame has; `timestamp` in seconds from the episode's start."""

CONVERTER = "lerobot.scripts.convert_dataset_v21_to_v30"


class DatasetError(ValueError):
    """A dataset that cannot be read, or data that a dataset cannot hold; one line says why."""


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
    """What a frame of a dataset holds, besides the indices.

    Args:
        cameras: camera name → (height, width) in pixels.
        state_names: of `observation.state`.
        action_names: of `action`.
        extras: feature key → what it is.
        use_video: pictures as video, else as image files inside the data.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_names: Sequence[str]
    action_names: Sequence[str]
    extras: Mapping[str, Extra] = field(default_factory=dict)
    use_video: bool = False

    def __post_init__(self) -> None:
        if not self.state_names or not self.action_names:
            raise DatasetError("a dataset needs the names of the state's and the action's entries")
        for names in (self.state_names, self.action_names):
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
                raise DatasetError(f"camera {camera!r} with pictures of {size} cannot be recorded")
            if self.use_video and any(side % 2 for side in size):
                raise DatasetError(
                    f"camera {camera!r}: video (yuv420p) needs even sizes, got {size}; record "
                    "images instead"
                )

    def vectors(self) -> dict[str, Extra]:
        """State, action and extras by feature key."""
        return {
            STATE_KEY: Extra((len(self.state_names),), names=self.state_names),
            ACTION_KEY: Extra((len(self.action_names),), names=self.action_names),
            **self.extras,
        }

    def as_info(self) -> dict[str, dict[str, Any]]:
        """The `features` of info.json."""
        info: dict[str, dict[str, Any]] = {
            key: {
                "dtype": vector.dtype,
                "shape": list(vector.shape),
                "names": None if vector.names is None else list(vector.names),
            }
            for key, vector in self.vectors().items()
        }
        for camera, (height, width) in self.cameras.items():
            info[IMAGE_PREFIX + camera] = {
                "dtype": "video" if self.use_video else "image",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
            }
        return {**info, **INDEX_FEATURES}


def flat_names(names: Any, size: int, prefix: str) -> list[str]:
    """Entry names as a list; older datasets have them in a dictionary, or not at all."""
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
    if file_index + 1 < FILES_PER_CHUNK:
        return chunk_index, file_index + 1
    return chunk_index + 1, 0


Statistics = dict[str, NDArray[Any]]
"""min, max, mean, std, count and the quantiles q01 … q99 of one feature."""


def vector_statistics(values: NDArray[Any]) -> Statistics:
    """Statistics of each entry over the data.

    LeRobot estimates the quantiles from histograms and, over several episodes, takes the outermost;
    these are NumPy's own, over all the data.

    Args:
        values: [n, ..., d], n ≥ 1; entries are what the last axis counts, as in LeRobot.

    Returns:
        Arrays [d]; `count` [1] is n.

    Raises:
        ValueError: there is no data.
    """
    if values.size == 0:
        raise ValueError("there are no statistics of no data")
    if values.ndim == 1:
        values = values[:, None]
    columns = values.reshape(-1, values.shape[-1])
    # column by column: float64 of all columns at once would take eight times the memory of float32
    rows = [_column_statistics(columns[:, k]) for k in range(columns.shape[1])]
    statistics: Statistics = {
        name: np.array([row[name] for row in rows]) for name in ("min", "max", "mean", "std")
    }
    statistics["count"] = np.array([len(values)])
    for name in QUANTILES:
        statistics[name] = np.array([row[name] for row in rows])
    return statistics


def _column_statistics(column: NDArray[Any]) -> dict[str, float]:
    column = np.ascontiguousarray(column, dtype=np.float64)
    quantiles = np.quantile(column, list(QUANTILES.values()))
    return {
        "min": float(column.min()),
        "max": float(column.max()),
        "mean": float(column.mean()),
        "std": float(column.std()),
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    }


class PictureHistogram:
    """Counts the values of RGB pictures; statistics of all pixels of all pictures counted."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._pictures = 0

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Count one picture [height, width, 3]."""
        for channel in range(3):
            self._counts[channel] += np.bincount(picture[..., channel].ravel(), minlength=256)
        self._pictures += 1

    def merge(self, other: PictureHistogram) -> None:
        """Count what `other` has counted, too."""
        self._counts += other._counts
        self._pictures += other._pictures

    def statistics(self) -> Statistics:
        """Per channel [3, 1, 1], values from 0 to 1; `count` [1] is the number of pictures.

        Raises:
            ValueError: no picture was added.
        """
        if self._pictures == 0:
            raise ValueError("there are no statistics of no pictures")
        values = np.arange(256) / 255.0
        n = int(self._counts[0].sum())
        mean = self._counts @ values / n
        variance = self._counts @ values**2 / n - mean**2
        seen = self._counts > 0
        found = {
            "min": values[seen.argmax(axis=1)],
            "max": values[255 - seen[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(variance, 0.0)),
        }
        below = self._counts.cumsum(axis=1)
        for name, q in QUANTILES.items():
            rank = q * (n - 1)
            low, high = (
                np.array([np.searchsorted(row, k, side="right") for row in below])
                for k in (np.floor(rank), np.ceil(rank))
            )
            found[name] = values[low] + (values[high] - values[low]) * (rank - np.floor(rank))
        statistics: Statistics = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        statistics["count"] = np.array([self._pictures])
        return statistics


@dataclass
class Metadata:
    """info.json, tasks.parquet and the table of episodes."""

    root: Path
    fps: float
    total_frames: int
    features: dict[str, dict[str, Any]]
    cameras: dict[str, str]
    """Camera name → feature key; depth maps are left out."""
    tasks: dict[int, str]
    robot_type: str = ""
    data_path: str = DATA_PATH
    video_path: str = VIDEO_PATH
    episodes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def names(self, key: str) -> list[str]:
        """Of the entries of a vector."""
        feature = self.features[key]
        return flat_names(feature.get("names"), int(np.prod(feature["shape"])), key)

    def image_size(self, key: str) -> tuple[int, int]:
        """(height, width) in pixels; the shape may stand channel first."""
        shape = [int(side) for side in self.features[key]["shape"]]
        if shape[0] in (1, 3) and shape[-1] not in (1, 3):
            return shape[1], shape[2]
        return shape[0], shape[1]

    def data_files(self) -> list[Path]:
        """The data files in the order of their frames.

        Raises:
            DatasetError: one is missing.
        """
        chunk, file = "data/chunk_index", "data/file_index"
        places = {(row[chunk], row[file]) for row in self.episodes.values() if chunk in row}
        named = [
            self.root / self.data_path.format(chunk_index=place[0], file_index=place[1])
            for place in sorted(places)
        ]
        files = named or sorted((self.root / "data").glob("*/*.parquet"))
        if not files:
            raise DatasetError(f"{self.root / 'data'} holds no parquet file")
        for path in files:
            if not path.is_file():
                raise DatasetError(f"{path} is missing; copy it there or record the dataset again")
        return files

    def video(self, episode: int, key: str) -> tuple[Path, float]:
        """The file of an episode's video and the time in it where the episode starts.

        Raises:
            DatasetError: the table of episodes does not say.
        """
        row = self.episodes.get(episode, {})
        try:
            path = self.video_path.format(
                video_key=key,
                chunk_index=row[f"videos/{key}/chunk_index"],
                file_index=row[f"videos/{key}/file_index"],
            )
            return self.root / path, float(row[f"videos/{key}/from_timestamp"])
        except KeyError as error:
            raise DatasetError(
                f"{self.root / 'meta/episodes'} does not say where the video of episode {episode}, "
                f"camera {key!r}, is: {error.args[0]!r} is missing"
            ) from None

    def stats(self) -> dict[str, Statistics]:
        """stats.json as arrays; {} if there is none."""
        path = self.root / STATS_PATH
        if not path.is_file():
            return {}
        return {
            key: {name: np.atleast_1d(np.array(value)) for name, value in found.items()}
            for key, found in _load_json(path).items()
        }


def load_metadata(root: Path) -> Metadata:
    """Read a dataset's metadata.

    Raises:
        DatasetError: no dataset, another version of the format, or damaged metadata.
    """
    path = root / INFO_PATH
    if not path.is_file():
        raise DatasetError(f"{root} is no LeRobot dataset: {INFO_PATH} is missing")
    info = _load_json(path)
    _check_version(root, str(info.get("codebase_version", "")))
    try:
        fps = float(info["fps"])
        features = {key: _feature(key, value) for key, value in info["features"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path} lacks or garbles {error}") from None
    if not fps > 0:
        raise DatasetError(f"{path}: fps must be > 0, got {fps:g}")
    tasks = root / TASKS_PATH
    if not tasks.is_file() and info.get("total_tasks", 1):
        raise DatasetError(f"{tasks} is missing; without it the instructions are unknown")
    episodes = _episodes(root)
    total = info.get("total_frames", sum(int(row["length"]) for row in episodes.values()))
    return Metadata(
        root=root,
        fps=fps,
        total_frames=int(total),
        features=features,
        cameras={
            camera_name(key): key
            for key, value in features.items()
            if value["dtype"] in ("image", "video") and not _is_depth(value)
        },
        tasks=read_tasks(tasks) if tasks.is_file() else {},
        robot_type=str(info.get("robot_type") or ""),
        data_path=info.get("data_path") or DATA_PATH,
        video_path=info.get("video_path") or VIDEO_PATH,
        episodes=episodes,
    )


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a JSON object")
    return content


def _check_version(root: Path, version: str) -> None:
    if version.startswith(("v3.", "3.")):
        return
    if version.startswith(("v1.", "v2.", "2.")):
        raise DatasetError(
            f"{root} has LeRobot's format {version}; convert it to {VERSION}: "
            f"python -m {CONVERTER} --repo-id=NAME --root={root} --push-to-hub=false"
        )
    raise DatasetError(f"{root} has LeRobot's format {version!r}, which is not {VERSION}")


def _feature(key: str, value: dict[str, Any]) -> dict[str, Any]:
    shape = [int(size) for size in value["shape"]]
    if not shape:
        raise ValueError(f"the shape of {key!r}")
    return {**value, "dtype": str(value["dtype"]), "shape": shape}


def _is_depth(feature: dict[str, Any]) -> bool:
    for place in ("info", "video_info"):
        info = feature.get(place) or {}
        if info.get("is_depth_map") or info.get("video.is_depth_map"):
            return True
    return False


def _episodes(root: Path) -> dict[int, dict[str, Any]]:
    """Episode number → its row in the table of episodes, without the statistics."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((root / "meta/episodes").glob("*/*.parquet")):
        try:
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            rows = pq.read_table(path, columns=names, partitioning=None).to_pylist()
            found.update({int(row["episode_index"]): row for row in rows})
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DatasetError(f"{path} cannot be read: {error}") from None
    return found


def read_tasks(path: Path) -> dict[int, str]:
    """Task index → instruction.

    Raises:
        DatasetError: the file cannot be read or is no table of tasks.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        indices = table.column("task_index").to_pylist()
        names = [name for name in table.column_names if name != "task_index"]
        return dict(zip(indices, table.column(names[0]).to_pylist(), strict=True))
    except (OSError, KeyError, IndexError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None
