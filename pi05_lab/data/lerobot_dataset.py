"""Reads LeRobot v3.0 datasets, the package's own and others'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi05_lab.data import lerobot_format as layout
from pi05_lab.data import parquet as tables
from pi05_lab.data.images import ParquetPictures
from pi05_lab.data.lerobot_format import DatasetError, Statistics, load_metadata, vector_statistics
from pi05_lab.data.video import VideoReader
from pi05_ros.types import ImageArray

CACHE_BYTES = 4 << 30
FPS_TOLERANCE = 0.05
"""By so much of a period the time between two frames of an episode may be off."""


@dataclass(frozen=True)
class Sample:
    """One frame and what was done, or should have been done, from it on."""

    images: dict[str, ImageArray]
    """Camera → RGB [height, width, 3]."""
    state: NDArray[np.float32]
    """[state_dim]"""
    actions: NDArray[np.float32]
    """[horizon, action_dim]; step k belongs to k / fps seconds after this frame."""
    is_pad: NDArray[np.bool_]
    """[horizon] steps after the episode's end, which repeat its last action."""
    task: str
    episode: int
    frame: int
    """The frame's number in the dataset."""


@dataclass(frozen=True)
class Split:
    """The episodes to train on and those that are kept from it."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


class LeRobotDataset:
    """A dataset on disk: numbers in memory, pictures read and decoded when asked for.

    May be read from several threads and, after pickling or a fork, processes.

    Args:
        root: the dataset's folder.
        fps: what the frames' rate must be; None takes any.
        cache_bytes: of encoded pictures kept in memory.

    Raises:
        DatasetError: no dataset, another version of the format, missing or damaged files, another
            rate, values that are not finite. The message names the file or frame, and the remedy.
    """

    def __init__(
        self, root: Path | str, fps: float | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.root = Path(root)
        self._meta = meta = load_metadata(self.root)
        if fps is not None and abs(meta.fps - fps) > 1e-6 * fps:
            raise DatasetError(
                f"{self.root} was recorded at {meta.fps:g} frames per second, {fps:g} are needed; "
                "record it again or change the configured rate"
            )
        for key in (layout.STATE_KEY, layout.ACTION_KEY):
            if key not in meta.features:
                raise DatasetError(
                    f"{self.root} has no {key!r}; its features are {sorted(meta.features)}"
                )
        self._files = meta.data_files()
        self.state = self._numbers(layout.STATE_KEY)
        """[n, state_dim] of all frames."""
        self.action = self._numbers(layout.ACTION_KEY)
        """[n, action_dim] of all frames."""
        if len(self) != meta.total_frames:
            raise DatasetError(
                f"{self.root}: the data files hold {len(self)} frames, meta/info.json says "
                f"{meta.total_frames}; copy the missing files or record the dataset again"
            )
        self.episode_index = self.extra("episode_index").astype(np.int64)
        """[n] the number of each frame's episode."""
        changes = np.flatnonzero(np.diff(self.episode_index)) + 1
        self._from = np.array([0, *changes], dtype=np.int64)
        self._to = np.array([*changes, len(self)], dtype=np.int64)
        self.episodes = self.episode_index[self._from]
        """[n_episodes] numbers of the episodes, in the order of their frames."""
        if len(set(self.episodes.tolist())) != len(self.episodes):
            raise DatasetError(f"{self.root}: the frames of an episode do not follow each other")
        self._run = np.repeat(np.arange(len(self._from)), self._to - self._from)
        self._check_finite()
        self._time_s = self._timestamps()
        if "task_index" in meta.features:
            self.task_index = self.extra("task_index").astype(np.int64)
        else:
            self.task_index = np.zeros(len(self), dtype=np.int64)
        self._check_tasks()
        has_chunks = layout.CHUNK_KEY in meta.features
        self._chunks = self._numbers(layout.CHUNK_KEY) if has_chunks else None
        self._pictures = ParquetPictures(self.root, self._files, cache_bytes)
        self._videos = VideoReader()

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.state)

    @property
    def fps(self) -> float:
        return self._meta.fps

    @property
    def robot_type(self) -> str:
        """Free text, "" if the dataset does not say."""
        return self._meta.robot_type

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._meta.cameras)

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Camera → (height, width) as the dataset states them, in pixels."""
        return {name: self._meta.image_size(key) for name, key in self._meta.cameras.items()}

    @property
    def state_names(self) -> list[str]:
        return self._meta.names(layout.STATE_KEY)

    @property
    def action_names(self) -> list[str]:
        return self._meta.names(layout.ACTION_KEY)

    @property
    def state_dim(self) -> int:
        return int(self.state.shape[1])

    @property
    def action_dim(self) -> int:
        return int(self.action.shape[1])

    @property
    def chunk_horizon(self) -> int | None:
        """Steps of the experts' labels; None where only the executed actions are recorded."""
        return None if self._chunks is None else int(self._chunks.shape[1])

    @property
    def tasks(self) -> dict[int, str]:
        """Task index → instruction."""
        return dict(self._meta.tasks)

    @property
    def extras(self) -> list[str]:
        """Keys of the features that are neither state, action, pictures nor indices."""
        known = {layout.STATE_KEY, layout.ACTION_KEY, *layout.INDEX_FEATURES}
        return [
            key
            for key, feature in self._meta.features.items()
            if key not in known and feature["dtype"] not in ("image", "video")
        ]

    @cached_property
    def stats(self) -> dict[str, Statistics]:
        """Feature → min, max, mean, std, count, q01 … q99.

        From meta/stats.json; what that lacks of state, action and `action_chunk` is computed from
        the data.
        """
        stats = self._meta.stats()
        for key, values in (
            (layout.STATE_KEY, self.state),
            (layout.ACTION_KEY, self.action),
            (layout.CHUNK_KEY, self._chunks),
        ):
            wanted = {"min", "max", "mean", "std", *layout.QUANTILES}
            if values is not None and not wanted <= set(stats.get(key, {})):
                stats[key] = vector_statistics(values)
        return stats

    def extra(self, key: str) -> NDArray[Any]:
        """[n, *shape] of any feature that is not a picture; [n] where it is one number.

        Raises:
            DatasetError: there is no such feature.
        """
        feature = self._meta.features.get(key)
        if feature is None or feature["dtype"] in ("image", "video"):
            raise DatasetError(f"{self.root} has no numbers {key!r}; it has {self.extras}")
        return tables.read_column(self._files, key, tuple(feature["shape"]))

    def task(self, frame: int) -> str:
        """The instruction of a frame."""
        return self._meta.tasks.get(int(self.task_index[frame]), "")

    def bounds(self, episode: int) -> tuple[int, int]:
        """The first frame of an episode and the one after its last.

        Raises:
            DatasetError: there is no such episode.
        """
        position = np.flatnonzero(self.episodes == episode)
        if not len(position):
            raise DatasetError(f"{self.root} has no episode {episode}")
        return int(self._from[position[0]]), int(self._to[position[0]])

    def frames_of(self, episodes: Iterable[int]) -> NDArray[np.int64]:
        """The frames of these episodes, in order."""
        wanted = np.asarray(list(episodes), dtype=np.int64)
        unknown = sorted(set(wanted.tolist()) - set(self.episodes.tolist()))
        if unknown:
            raise DatasetError(f"{self.root} has no episode {unknown[0]}")
        return np.flatnonzero(np.isin(self.episode_index, wanted))

    def split(self, held_out: float = 0.1, seed: int = 0) -> Split:
        """Divide the episodes by chance, the same for the same seed.

        Args:
            held_out: fraction of the episodes, from 0 to less than 1; if it is more than 0, at
                least one episode is held out, and at least one is trained on.
            seed: of the choice.
        """
        if not 0.0 <= held_out < 1.0:
            raise ValueError(f"held_out must be from 0 to less than 1, got {held_out}")
        count = round(held_out * len(self.episodes))
        if held_out > 0.0:
            count = min(max(count, 1), len(self.episodes) - 1)
        order = np.random.default_rng(seed).permutation(self.episodes)
        return Split(np.sort(order[count:]), np.sort(order[:count]))

    def images(self, frame: int, cameras: Sequence[str] | None = None) -> dict[str, ImageArray]:
        """Camera → RGB [height, width, 3] of a frame.

        Raises:
            DatasetError: an unknown camera, or a picture that cannot be read.
        """
        chosen = self.cameras if cameras is None else cameras
        frame = self._checked(frame)
        return {camera: self._image(frame, camera) for camera in chosen}

    def frame(self, frame: int) -> Sample:
        """A frame with the one action that was executed from it."""
        frame = self._checked(frame)
        return self._sample(frame, self.action[frame : frame + 1], np.zeros(1, dtype=bool), None)

    def sample(self, frame: int, horizon: int, cameras: Sequence[str] | None = None) -> Sample:
        """A frame with a chunk of actions: the expert's where recorded, else those that follow.

        Args:
            frame: 0 … len − 1.
            horizon: steps of the chunk.
            cameras: those wanted; None for all.

        Raises:
            DatasetError: the recorded chunks are shorter than `horizon`, or a picture cannot be
                read.
            IndexError: there is no such frame.
        """
        frame = self._checked(frame)
        return self._sample(frame, *self.actions(frame, horizon), cameras)

    def _sample(
        self,
        frame: int,
        actions: NDArray[np.float32],
        is_pad: NDArray[np.bool_],
        cameras: Sequence[str] | None,
    ) -> Sample:
        return Sample(
            images=self.images(frame, cameras),
            state=self.state[frame],
            actions=actions,
            is_pad=is_pad,
            task=self.task(frame),
            episode=int(self.episode_index[frame]),
            frame=frame,
        )

    def actions(self, frame: int, horizon: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[horizon, action_dim] actions from a frame on, and [horizon] where they are padding."""
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        if self._chunks is not None:
            if horizon > self._chunks.shape[1]:
                raise DatasetError(
                    f"{self.root} has chunks of {self._chunks.shape[1]} steps, {horizon} are "
                    "needed; record longer ones or lower the horizon"
                )
            return self._chunks[frame, :horizon], np.zeros(horizon, dtype=bool)
        wanted = np.arange(frame, frame + horizon)
        end = self._to[self._run[frame]]
        return self.action[np.minimum(wanted, end - 1)], wanted >= end

    def _checked(self, frame: int) -> int:
        if not 0 <= frame < len(self):
            raise IndexError(f"frame {frame} of {len(self)}")
        return int(frame)

    def _image(self, frame: int, camera: str) -> ImageArray:
        key = self._meta.cameras.get(camera)
        if key is None:
            raise DatasetError(f"{self.root} has no camera {camera!r}; it has {self.cameras}")
        if self._meta.features[key]["dtype"] == "image":
            return self._pictures.picture(key, frame)
        path, start_s = self._meta.video(int(self.episode_index[frame]), key)
        return self._videos.frame(path, start_s + float(self._time_s[frame]), self.fps)

    def _numbers(self, key: str) -> NDArray[np.float32]:
        shape = tuple(self._meta.features[key]["shape"])
        values = tables.read_column(self._files, key, shape)
        return values.reshape(len(values), *shape).astype(np.float32, copy=False)

    def _check_finite(self) -> None:
        for key, values in ((layout.STATE_KEY, self.state), (layout.ACTION_KEY, self.action)):
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                frame, entry = (int(k) for k in bad[0])
                episode = int(self.episode_index[frame])
                raise DatasetError(
                    f"{self.root}: {self._meta.names(key)[entry]!r} of {key!r} is "
                    f"{values[frame, entry]} in frame {frame - self.bounds(episode)[0]} of episode "
                    f"{episode}; remove that episode (lerobot-edit-dataset) or record it again"
                )

    def _timestamps(self) -> NDArray[np.float64]:
        """[n] seconds since the episode's first frame."""
        if "timestamp" not in self._meta.features:
            return (np.arange(len(self)) - self._from[self._run]) / self.fps
        time_s = self.extra("timestamp").astype(np.float64)
        off = np.abs(np.diff(time_s) * self.fps - 1.0) > FPS_TOLERANCE
        off &= np.diff(self.episode_index) == 0
        if off.any():
            frame = int(np.argmax(off))
            first = self._from[self._run[frame]]
            raise DatasetError(
                f"{self.root}, episode {self.episode_index[frame]}: frames {frame - first} and "
                f"{frame - first + 1} are {time_s[frame + 1] - time_s[frame]:.4f} s apart, at "
                f"{self.fps:g} frames per second they would be {1 / self.fps:.4f} s; correct fps "
                "in meta/info.json or record it again"
            )
        return time_s

    def _check_tasks(self) -> None:
        unknown = set(np.unique(self.task_index).tolist()) - set(self._meta.tasks)
        if self._meta.tasks and unknown:
            raise DatasetError(
                f"{self.root / layout.TASKS_PATH} lacks task {min(unknown)}, which frames have"
            )
