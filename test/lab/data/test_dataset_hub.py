"""Data sets of the Hub, from a folder that stands for it.

Faults: a disk that fills, a video that is fetched for each frame, an error of many lines.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_lab.data import lerobot_format as layout
from pi05_lab.data.hub import open_dataset
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import DatasetError, Features
from pi05_lab.data.lerobot_writer import DatasetWriter

SIDE = 16


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six episodes, each with a video of its own."""
    monkeypatch.setattr(layout, "VIDEO_FILE_MB", 0)
    root = tmp_path / "remote"
    rng = np.random.default_rng(0)
    with DatasetWriter(root, 10, Features({"cam": (SIDE, SIDE)}, ["x"], ["x"], {}, True)) as writer:
        for episode in range(6):
            for _ in range(20):
                image = rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
                writer.add_frame({"cam": image}, [episode], [episode], "go")
            writer.end_episode()
    return root


@pytest.fixture
def fetched(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the Hub."""
    names: list[str] = []

    def snapshot_download(repo: str, local_dir: Path | None = None, **options: Any) -> str:
        names.append(repo)
        target = local_dir or tmp_path / "snapshot"
        left_out = options.get("ignore_patterns")
        ignore = shutil.ignore_patterns("videos") if left_out else None
        shutil.copytree(remote, target, ignore=ignore, dirs_exist_ok=True)
        return str(target)

    def hf_hub_download(repo: str, name: str, local_dir: Path, **_: Any) -> None:
        names.append(name)
        if not remote.is_dir():
            raise OSError("no connection\nat all")
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(remote / name, local_dir / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return names


def images(data: LeRobotDataset) -> Callable[[int], Any]:
    return lambda frame: data.images(frame)["cam"]


def test_a_whole_data_set_is_fetched_once(remote: Path, fetched: list[str]) -> None:
    folder, fetch = open_dataset("lab/data@v1")
    assert fetch is None and fetched == ["lab/data"]
    np.testing.assert_array_equal(
        images(LeRobotDataset(folder))(50), images(LeRobotDataset(remote))(50)
    )
    assert open_dataset(remote) == (remote, None)
    missing = open_dataset("no such folder")[0]
    with pytest.raises(DatasetError, match="is not a LeRobot data set"):
        LeRobotDataset(missing)


def test_videos_are_fetched_as_needed_and_removed(remote: Path, fetched: list[str]) -> None:
    """At most two stay; those that were used longest ago go first."""
    size = max(path.stat().st_size for path in remote.rglob("*.mp4"))
    folder, fetch = open_dataset("lab/data", int(2.5 * size))
    assert fetch is not None and not list(folder.rglob("*.mp4"))
    here, there = LeRobotDataset(folder, fetch=fetch), LeRobotDataset(remote)
    assert there.image_files().tolist() == np.repeat(np.arange(6), 20).tolist()
    for frame in (0, 5, 25, 0, 45, 119, 100):
        np.testing.assert_array_equal(images(here)(frame), images(there)(frame))
        assert len(list(folder.rglob("*.mp4"))) <= 2
    files = [int(name[-7:-4]) for name in fetched if name.endswith(".mp4")]
    assert files == [0, 1, 2, 5]
    shutil.rmtree(remote)
    with pytest.raises(DatasetError, match=r"003\.mp4 cannot be fetched: OSError: no connection$"):
        images(here)(65)


def test_an_unreachable_data_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("timed out\nTraceback")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(DatasetError, match="ConnectionError: timed out") as caught:
        open_dataset("lab/data")
    assert "\n" not in str(caught.value)
