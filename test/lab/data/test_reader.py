"""Faults pinned: actions of the next episode in a chunk, held-out episodes in training, other
people's datasets that do not load, and broken ones that load."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LENGTHS

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import DatasetError, Features
from pi05_lab.data.lerobot_writer import DatasetWriter

LEROBOT = Path(__file__).parents[2] / "data/lerobot_v3"
Write = Callable[..., Path]
Numbers = dict[str, list[Any]]


@pytest.mark.parametrize("kind", ["images", "video"])
def test_data_written_by_lerobot_are_read(kind: str) -> None:
    dataset = LeRobotDataset(LEROBOT / kind)
    assert len(dataset) == 24 and dataset.episodes.tolist() == [0, 1, 2]
    assert dataset.cameras == ("top",) and dataset.image_sizes == {"top": (64, 64)}
    assert all(
        dataset.meta.names(key) == ["a", "b", "c"] for key in ("observation.state", "action")
    )
    assert dataset.meta.robot_type == "so101" and dataset.fps == 30
    for frame in (0, 7, 8, 15, 16, 23):
        episode, k = divmod(frame, 8)
        found = dataset.sample(frame, 4)
        assert found.task == ("push the cube", "wave")[episode % 2]
        np.testing.assert_array_equal(found.state, np.array([episode, k, 0.5], np.float32))
        steps = np.minimum(k + np.arange(4), 7)
        np.testing.assert_array_equal(found.actions[:, 1], steps + 0.25)
        np.testing.assert_array_equal(found.is_pad, k + np.arange(4) > 7)
        pixel = found.images["top"][30, 20].astype(int)
        error = np.abs(pixel - [40 * episode + 60, 60, 25 * k + 20])
        assert error.max() <= (0 if kind == "images" else 8), pixel


def test_a_chunk_ends_with_its_episode(write: Write, numbers: Numbers) -> None:
    dataset = LeRobotDataset(write())
    frame = 0
    for episode, length in enumerate(LENGTHS):
        actions = numbers["action"][episode]
        for k in range(length):
            sample = dataset.sample(frame, 3)
            assert sample.is_pad.tolist() == [k + step >= length for step in range(3)]
            expected = [actions[min(k + step, length - 1)] for step in range(3)]
            np.testing.assert_array_equal(sample.actions, expected)
            frame += 1


def test_recorded_labels_replace_the_executed_actions(write: Write, numbers: Numbers) -> None:
    dataset = LeRobotDataset(write(label=True))
    sample = dataset.sample(13, 3, cameras=["wrist"])
    np.testing.assert_array_equal(sample.actions, numbers["label"][2][7][:3])
    assert not sample.is_pad.any() and list(sample.images) == ["wrist"]
    with pytest.raises(DatasetError, match="chunks of 4 steps, 5 are needed"):
        dataset.sample(0, 5)


def test_unknown_frames_cameras_and_episodes_are_rejected(write: Write) -> None:
    dataset = LeRobotDataset(write())
    for frame in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"frame {frame} of 14"):
            dataset.sample(frame, 3)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        dataset.sample(0, 0)
    with pytest.raises(DatasetError, match="no camera 'side'"):
        dataset.sample(0, 1, cameras=["side"])
    with pytest.raises(DatasetError, match="no episode 3"):
        dataset.frames_of([3])
    with pytest.raises(DatasetError, match="no numbers 'observation"):
        dataset.extra("observation.images.high")


@settings(max_examples=15, deadline=None)
@given(held_out=st.floats(0.0, 0.99), seed=st.integers(0, 1 << 30))
def test_every_episode_is_on_one_side_of_a_split(held_out: float, seed: int) -> None:
    dataset = LeRobotDataset(LEROBOT / "images")
    split = dataset.split(held_out, seed)
    again = dataset.split(held_out, seed)
    np.testing.assert_array_equal(split.train, again.train)
    assert sorted([*split.train, *split.held_out]) == [0, 1, 2]
    assert len(split.train) >= 1 and (len(split.held_out) >= 1) == (held_out > 0)
    frames = [*dataset.frames_of(split.train), *dataset.frames_of(split.held_out)]
    assert sorted(frames) == list(range(24))


def test_appended_episodes_move_no_other_one_across_the_split(tmp_path: Path) -> None:
    """Fault: 6 of 10 new held-out episodes had been trained on before."""
    rng = np.random.default_rng(0)
    states = [rng.uniform(-1, 1, (3, 2)).astype(np.float32) for _ in range(60)]
    sides = []
    for name, episodes in (("before", states[:40]), ("after", states[::-1])):
        with DatasetWriter(tmp_path / name, 10, Features({}, ["x", "y"], ["x", "y"])) as writer:
            for rows in episodes:
                for row in rows:
                    writer.add_frame({}, row, row, "go")
                writer.end_episode()
        dataset = LeRobotDataset(tmp_path / name)
        held_out = dataset.frames_of(dataset.split(0.3).held_out)
        sides.append({tuple(dataset.state[frame]) for frame in held_out})
    before, after = sides
    known = {tuple(row) for rows in states[:40] for row in rows}
    assert before and before == after & known
    assert 8 <= len(after) / 3 <= 28


@pytest.mark.parametrize("use_video", [False, True])
def test_a_copy_in_another_process_reads_the_same(write: Write, use_video: bool) -> None:
    """A data loader pickles the dataset after it has been read from."""
    dataset = LeRobotDataset(write(use_video=use_video))
    before = dataset.sample(9, 3)
    copied = pickle.loads(pickle.dumps(dataset)).sample(9, 3)
    np.testing.assert_array_equal(before.actions, copied.actions)
    for camera, image in before.images.items():
        np.testing.assert_array_equal(image, copied.images[camera])


def test_a_small_cache_changes_nothing() -> None:
    whole = LeRobotDataset(LEROBOT / "images")
    small = LeRobotDataset(LEROBOT / "images", cache_bytes=1)
    for frame in (0, 23, 8, 0):
        np.testing.assert_array_equal(whole.images(frame)["top"], small.images(frame)["top"])


def edit_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def test_optional_parts_may_be_missing(write: Write) -> None:
    root = write()

    def strip(info: dict[str, Any]) -> None:
        for key in ("robot_type", "splits", "total_frames", "data_path", "video_path"):
            del info[key]
        info["features"]["action"]["names"] = None

    edit_info(root, strip)
    (root / "meta/stats.json").unlink()
    dataset = LeRobotDataset(root)
    assert dataset.meta.robot_type == "" and dataset.meta.names("action")[0] == "action_0"


def rewrite(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def with_nan(table: pa.Table) -> pa.Table:
    rows = table.column("action").to_pylist()
    rows[7][1] = float("nan")
    kind = table.schema.field("action").type
    return table.set_column(table.schema.get_field_index("action"), "action", pa.array(rows, kind))


def unknown_task(table: pa.Table) -> pa.Table:
    column = pa.array([5] * len(table), pa.int64())
    return table.set_column(table.schema.get_field_index("task_index"), "task_index", column)


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "old version": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v2.1")),
        r"format v2\.1; convert it to v3\.0: python -m .*convert_dataset_v21_to_v30",
    ),
    "future version": (
        lambda root: edit_info(root, lambda info: info.update(codebase_version="v4.0")),
        r"'v4\.0', which is not v3\.0",
    ),
    "no info": (lambda root: (root / "meta/info.json").unlink(), "is not a LeRobot data set"),
    "garbled info": (lambda root: (root / "meta/info.json").write_text("{"), "info.json cannot be"),
    "no features": (lambda root: edit_info(root, lambda info: info.pop("features")), "'features'"),
    "no fps": (lambda root: edit_info(root, lambda info: info.update(fps=0)), "fps must be > 0"),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.parquet is missing"),
    "other tasks": (lambda root: rewrite(root, unknown_task), "lacks task 5"),
    "no data": (lambda root: shutil.rmtree(root / "data"), "file-000.parquet is missing"),
    "cut data": (
        lambda root: (root / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1" * 20),
        "file-000.parquet cannot be read",
    ),
    "lost frames": (
        lambda root: rewrite(root, lambda table: table.slice(0, 9)),
        "hold 9 frames, meta/info.json says 14",
    ),
    "nan": (lambda root: rewrite(root, with_nan), "'b' of 'action' is nan in frame 1 of episode 2"),
    "wrong fps": (
        lambda root: edit_info(root, lambda info: info.update(fps=25)),
        r"0\.1000 s apart, at 25 frames per second they would be 0\.0400 s",
    ),
    "no state": (
        lambda root: edit_info(root, lambda info: info["features"].pop("observation.state")),
        "has no 'observation.state'",
    ),
    "wrong shape": (
        lambda root: edit_info(root, lambda info: info["features"]["action"].update(shape=[4])),
        r"'action' does not have shape \[4\]",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_dataset_says_what_is_wrong(write: Write, name: str) -> None:
    root = write()
    damage, reason = BREAKS[name]
    damage(root)
    with pytest.raises(DatasetError, match=reason):
        LeRobotDataset(root)


def test_a_missing_or_cut_video_is_named(write: Write) -> None:
    root = write(use_video=True)
    video = root / "videos/observation.images.high/chunk-000/file-000.mp4"
    content = video.read_bytes()
    video.write_bytes(content[:100])
    with pytest.raises(DatasetError, match=r"file-000\.mp4 cannot be read"):
        LeRobotDataset(root).images(0)
    video.unlink()
    with pytest.raises(DatasetError, match=r"file-000\.mp4 is missing"):
        LeRobotDataset(root).images(0)


def test_a_damaged_image_is_named(write: Write) -> None:
    root = write()

    def blank(table: pa.Table) -> pa.Table:
        key = "observation.images.high"
        rows = [{"bytes": b"not a file.", "path": None}] * len(table)
        kind = table.schema.field(key).type
        return table.set_column(table.schema.get_field_index(key), key, pa.array(rows, kind))

    rewrite(root, blank)
    with pytest.raises(DatasetError, match=r"high, row 3: cannot decode 11 bytes"):
        LeRobotDataset(root).images(3)
