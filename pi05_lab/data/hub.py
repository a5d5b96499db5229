"""Data sets of the Hugging Face Hub: fetched whole, or video by video as they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.policy.checkpoint import HUB_ID

VIDEOS = "videos"


def open_dataset(
    root: str | Path, disk_bytes: int = 0
) -> tuple[Path, Callable[[Path], None] | None]:
    """The local folder of a data set, and what fetches a video that it lacks.

    A Hugging Face id that is not cached is downloaded; with `disk_bytes` without its videos, of
    which at most that much is kept.

    Raises:
        DatasetError: neither a folder nor an id that can be fetched.
    """
    folder = Path(root).expanduser()
    match = HUB_ID.fullmatch(str(root))
    if folder.exists() or match is None:
        return folder, None
    from huggingface_hub import constants, snapshot_download

    repo, revision = match["repo"], match["revision"]
    options: dict[str, Any] = {}
    if disk_bytes:
        name = str(root).replace("/", "--")
        folder = Path(constants.HF_HOME) / "pi05_ros" / name
        options = {"local_dir": folder, "ignore_patterns": [f"{VIDEOS}/*"]}
    try:
        found = snapshot_download(repo, repo_type="dataset", revision=revision, **options)
    except Exception as error:  # the hub's own, those of its HTTP client, OSError
        raise DatasetError(
            f"{root} is not a folder here, and as a Hugging Face data set it is neither cached nor "
            f"can it be fetched ({_reason(error)}). Check its spelling and the connection, or log "
            "in where it is gated"
        ) from None
    if not disk_bytes:
        return Path(found), None
    return folder, VideoCache(repo, revision, folder, disk_bytes)


@dataclass(frozen=True)
class VideoCache:
    """Fetches videos into a data set's folder, and removes those that were used longest ago."""

    repo: str
    revision: str | None
    folder: Path
    limit_bytes: int

    def __call__(self, path: Path) -> None:
        """Make a video exist; DatasetError if it cannot be fetched."""
        try:
            os.utime(path)  # the time of use
            return
        except FileNotFoundError:
            pass
        from huggingface_hub import hf_hub_download

        name = path.relative_to(self.folder).as_posix()
        try:
            hf_hub_download(
                self.repo, name, repo_type="dataset", revision=self.revision, local_dir=self.folder
            )
        except Exception as error:  # the hub's own, those of its HTTP client, OSError
            raise DatasetError(f"{self.repo}: {name} cannot be fetched: {_reason(error)}") from None
        os.utime(path)
        self._remove_oldest(keep=path)

    def _remove_oldest(self, keep: Path) -> None:
        files = [(file, file.stat()) for file in (self.folder / VIDEOS).rglob("*.mp4")]
        used = sum(status.st_size for _, status in files)
        for file, status in sorted(files, key=lambda entry: entry[1].st_mtime):
            if used <= self.limit_bytes:
                return
            if file != keep:
                # an open video stays readable; another process may have removed it
                file.unlink(missing_ok=True)
                used -= status.st_size


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
