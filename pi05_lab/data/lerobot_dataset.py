"""Reads LeRobot v3.0 data sets, the package's own and others'."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi05_lab.data import lerobot_format as layout
from pi05_lab.data.images import ParquetImages
from pi05_lab.data.lerobot_format import ACTION_KEY, STATE_KEY, DatasetError, is_image
from pi05_lab.data.parquet import read_column
from pi05_lab.data.video import VideoReader
from pi05_ros.types import ImageArray

CACHE_BYTES = 4 << 30
FPS_TOLERANCE = 0.05
"""Largest error of the time between two frames of an episode, in periods."""


@dataclass(frozen=True)
class Sample:
    """One frame and the actions, executed or labelled, from it on."""

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
    """The frame's number in the data set."""


@dataclass(frozen=True)
class Split:
    """Numbers of the episodes for training and of those held out."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


class LeRobotDataset:
    """The data set in folder `root`: numbers in memory, images read and decoded on demand.

    At most `cache_bytes` of encoded images are kept. `fetch` is called with the path of a video
    before it is read, and makes it exist. May be read from several threads and, after pickling or a
    fork, processes.

    Raises:
        DatasetError: no data set, another version of the format, missing or damaged files, values
            that are not finite. The message names the file or frame, and the remedy.
    """

    def __init__(
        self,
        root: Path | str,
        cache_bytes: int = CACHE_BYTES,
        fetch: Callable[[Path], None] | None = None,
    ) -> None:
        self.root = Path(root)
        self._fetch = fetch
        self.meta = meta = layout.Metadata(self.root)
        for key in (STATE_KEY, ACTION_KEY):
            if key not in meta.features:
                raise DatasetError(
                    f"{self.root} has no {key!r}; its features are {sorted(meta.features)}"
                )
        self.fps = meta.fps
        self.cameras = tuple(meta.cameras)
        self._files = meta.data_files()
        self.state = self._vectors(STATE_KEY)
        """[n, state_dim] of all frames."""
        self.action = self._vectors(ACTION_KEY)
        """[n, action_dim] of all frames."""
        self.state_dim, self.action_dim = self.state.shape[1], self.action.shape[1]
        if len(self) != meta.total_frames:
            raise DatasetError(
                f"{self.root}: the data files hold {len(self)} frames, meta/info.json says "
                f"{meta.total_frames}; copy the missing files or record the data set again"
            )
        self.episode_index = self.extra("episode_index").astype(np.int64)
        """[n] the number of each frame's episode."""
        changes = np.flatnonzero(np.diff(self.episode_index)) + 1
        self._from = np.array([0, *changes], dtype=np.int64)
        self._to = np.array([*changes, len(self)], dtype=np.int64)
        self.episodes = self.episode_index[self._from]
        """[n_episodes] numbers of the episodes, in the order of their frames."""
        if len(set(self.episodes.tolist())) != len(self.episodes):
            raise DatasetError(f"{self.root}: the frames of an episode are not consecutive")
        self._position = np.repeat(np.arange(len(self._from)), self._to - self._from)
        self._check_finite()
        self._time_s = self._timestamps()
        self.task_index: NDArray[np.int64] = np.zeros(len(self), dtype=np.int64)
        """[n] the number of each frame's instruction."""
        if "task_index" in meta.features:
            self.task_index = self.extra("task_index").astype(np.int64)
        unknown = set(np.unique(self.task_index).tolist()) - set(meta.tasks)
        if meta.tasks and unknown:
            raise DatasetError(
                f"{self.root / layout.TASKS_PATH} lacks task {min(unknown)} of the frames"
            )
        chunk_keys = [k for k in (layout.CHUNK_KEY, layout.OLD_CHUNK_KEY) if k in meta.features]
        self._chunks = self._vectors(chunk_keys[0]) if chunk_keys else None
        self._images = ParquetImages(self.root, self._files, cache_bytes)
        self._videos = VideoReader()

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.state)

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Camera → (height, width) in pixels, as info.json has them."""
        return {name: self.meta.image_size(key) for name, key in self.meta.cameras.items()}

    @property
    def extras(self) -> list[str]:
        """Keys of the features besides state, action, images and indices."""
        known = {STATE_KEY, ACTION_KEY, *layout.INDEX_FEATURES}
        features = self.meta.features.items()
        return [key for key, feature in features if key not in known and not is_image(feature)]

    def extra(self, key: str) -> NDArray[Any]:
        """[n, *shape] of any feature that is not an image; [n] where it is one number."""
        feature = self.meta.features.get(key)
        if feature is None or is_image(feature):
            raise DatasetError(f"{self.root} has no numbers {key!r}; it has {self.extras}")
        return read_column(self._files, key, tuple(feature["shape"]))

    def task(self, frame: int) -> str:
        """The instruction of a frame."""
        return self.meta.tasks.get(int(self.task_index[frame]), "")

    def bounds(self, episode: int) -> tuple[int, int]:
        """The first frame of an episode and the one after its last; DatasetError if unknown."""
        position = np.flatnonzero(self.episodes == episode)
        if not len(position):
            raise DatasetError(f"{self.root} has no episode {episode}")
        return int(self._from[position[0]]), int(self._to[position[0]])

    def image_files(self) -> NDArray[np.int64]:
        """[n] the number of the file that has each frame's images, of the first camera if several.

        Numbers rise with the frames.
        """
        videos = [
            key for key in self.meta.cameras.values() if self.meta.features[key]["dtype"] == "video"
        ]
        episodes = self.episodes.tolist()
        if videos:
            places = [self.meta.video(episode, videos[0])[0] for episode in episodes]
        else:
            places = [self.meta.data_file(episode) for episode in episodes]
        number = {place: k for k, place in enumerate(dict.fromkeys(places))}
        return np.array([number[place] for place in places], dtype=np.int64)[self._position]

    def frames_of(self, episodes: Iterable[int]) -> NDArray[np.int64]:
        """The frames of these episodes, in order; raises as `bounds`."""
        chosen = [np.arange(*self.bounds(episode)) for episode in sorted(set(episodes))]
        return np.sort(np.concatenate([np.arange(0), *chosen]))

    def split(self, held_out: float = 0.1, seed: int = 0) -> Split:
        """Divide the episodes by a hash of their content and the seed.

        Episodes that are appended, removed or renumbered move no other one to the other side, with
        one exception: if `held_out` is more than 0, at least one episode is held out, and at least
        one is trained on.

        Args:
            held_out: expected fraction of the episodes, from 0 to less than 1.
            seed: another one gives another split.
        """
        if not 0.0 <= held_out < 1.0:
            raise ValueError(f"held_out must be from 0 to less than 1, got {held_out}")
        bounds = zip(self._from, self._to, strict=True)
        hashes = np.array([self._hash(slice(*rows), seed) for rows in bounds])
        order = np.argsort(hashes, kind="stable")
        count = int((hashes < held_out).sum())
        if held_out > 0.0:
            count = min(max(count, 1), len(self.episodes) - 1)
        return Split(np.sort(self.episodes[order[count:]]), np.sort(self.episodes[order[:count]]))

    def _hash(self, rows: slice, seed: int) -> float:
        """A number from 0 to 1 that the frames' content and the seed determine."""
        digest = hashlib.blake2b(f"{seed}".encode(), digest_size=8)
        for values in (self.state[rows], self.action[rows]):
            digest.update(values.tobytes())
        return int.from_bytes(digest.digest(), "little") / 2**64

    def images(self, frame: int, cameras: Sequence[str] | None = None) -> dict[str, ImageArray]:
        """Camera → RGB [height, width, 3] of a frame; of all cameras if None.

        DatasetError for an unknown camera or an image that cannot be read, IndexError for no such
        frame.
        """
        if not 0 <= frame < len(self):
            raise IndexError(f"frame {frame} of {len(self)}")
        chosen = self.cameras if cameras is None else cameras
        return {camera: self._image(frame, camera) for camera in chosen}

    def sample(self, frame: int, horizon: int, cameras: Sequence[str] | None = None) -> Sample:
        """A frame with a chunk of actions: the expert's where recorded, else the following ones.

        Raises as `images`; DatasetError also if the recorded chunks are shorter than `horizon`.
        """
        images = self.images(frame, cameras)
        actions, is_pad = self.actions(frame, horizon)
        episode, task = int(self.episode_index[frame]), self.task(frame)
        return Sample(images, self.state[frame], actions, is_pad, task, episode, int(frame))

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
        steps = np.arange(frame, frame + horizon)
        end = self._to[self._position[frame]]
        return self.action[np.minimum(steps, end - 1)], steps >= end

    def _image(self, frame: int, camera: str) -> ImageArray:
        key = self.meta.cameras.get(camera)
        if key is None:
            raise DatasetError(f"{self.root} has no camera {camera!r}; it has {self.cameras}")
        if self.meta.features[key]["dtype"] == "image":
            return self._images.image(key, frame)
        path, start_s = self.meta.video(int(self.episode_index[frame]), key)
        if self._fetch is not None:
            self._fetch(path)
        return self._videos.frame(path, start_s + float(self._time_s[frame]), self.fps)

    def _vectors(self, key: str) -> NDArray[np.float32]:
        shape = tuple(self.meta.features[key]["shape"])
        values = read_column(self._files, key, shape)
        return values.reshape(len(values), *shape).astype(np.float32, copy=False)

    def _check_finite(self) -> None:
        for key, values in ((STATE_KEY, self.state), (ACTION_KEY, self.action)):
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                frame, entry = (int(k) for k in bad[0])
                episode = int(self.episode_index[frame])
                raise DatasetError(
                    f"{self.root}: {self.meta.names(key)[entry]!r} of {key!r} is "
                    f"{values[frame, entry]} in frame {frame - self.bounds(episode)[0]} of episode "
                    f"{episode}; remove that episode (lerobot-edit-dataset) or record it again"
                )

    def _timestamps(self) -> NDArray[np.float64]:
        """[n] seconds since the episode's first frame."""
        first = self._from[self._position]
        if "timestamp" not in self.meta.features:
            return (np.arange(len(self)) - first) / self.fps
        time_s = self.extra("timestamp").astype(np.float64)
        steps_s = np.diff(time_s)
        off = np.abs(steps_s * self.fps - 1.0) > FPS_TOLERANCE
        off &= np.diff(self.episode_index) == 0
        if off.any():
            frame = int(np.argmax(off))
            number = frame - first[frame]
            raise DatasetError(
                f"{self.root}, episode {self.episode_index[frame]}: frames {number} and "
                f"{number + 1} are {steps_s[frame]:.4f} s apart, at {self.fps:g} frames per second "
                f"they would be {1 / self.fps:.4f} s; correct fps in meta/info.json or record it "
                "again"
            )
        return time_s
