"""A dataset's `meta` folder: what it holds and in which files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_ros.recording import layout, tables
from pi05_ros.recording.layout import DatasetError
from pi05_ros.recording.statistics import Statistics


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
    data_path: str = layout.DATA_PATH
    video_path: str = layout.VIDEO_PATH
    episodes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def names(self, key: str) -> list[str]:
        """Of the entries of a vector."""
        feature = self.features[key]
        return layout.flat_names(feature.get("names"), int(np.prod(feature["shape"])), key)

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
        path = self.root / layout.STATS_PATH
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
    path = root / layout.INFO_PATH
    if not path.is_file():
        raise DatasetError(f"{root} is no LeRobot dataset: {layout.INFO_PATH} is missing")
    info = _load_json(path)
    _check_version(root, str(info.get("codebase_version", "")))
    try:
        fps = float(info["fps"])
        features = {key: _feature(key, value) for key, value in info["features"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path} lacks or garbles {error}") from None
    if not fps > 0:
        raise DatasetError(f"{path}: fps must be > 0, got {fps:g}")
    tasks = root / layout.TASKS_PATH
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
            layout.camera_name(key): key
            for key, value in features.items()
            if value["dtype"] in ("image", "video") and not _is_depth(value)
        },
        tasks=tables.read_tasks(tasks) if tasks.is_file() else {},
        robot_type=str(info.get("robot_type") or ""),
        data_path=info.get("data_path") or layout.DATA_PATH,
        video_path=info.get("video_path") or layout.VIDEO_PATH,
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
            f"{root} has LeRobot's format {version}; convert it to {layout.VERSION}: "
            f"python -m {layout.CONVERTER} --repo-id=NAME --root={root} --push-to-hub=false"
        )
    raise DatasetError(f"{root} has LeRobot's format {version!r}, which is not {layout.VERSION}")


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
