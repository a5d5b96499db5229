"""The LeRobot dataset format v3.0: paths, keys, features.

Source: LeRobot 0.4–0.6, `src/lerobot/datasets`: `utils.py`, `feature_utils.py`,
`dataset_metadata.py`, `dataset_writer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
