"""Round trips. Faults pinned: images, numbers or instructions that come back other than they
went in, files that grow with every repeated image, a half dataset that looks whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic import JOINTS, LENGTHS, SIZES, image_of, task_of

from pi05_lab.data import lerobot_format as layout
from pi05_lab.data.images import encode
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import DatasetError, Extra, Features, read_tasks
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.data.parquet import write_tasks

Write = Callable[..., Path]
Numbers = dict[str, list[Any]]


def all_frames() -> list[tuple[int, int]]:
    return [(episode, k) for episode, length in enumerate(LENGTHS) for k in range(length)]


def test_recorded_data_are_read_back(write: Write, numbers: Numbers) -> None:
    dataset = LeRobotDataset(write())
    assert len(dataset) == sum(LENGTHS)
    assert dataset.cameras == tuple(SIZES) and dataset.image_sizes == SIZES
    assert dataset.meta.names("observation.state") == dataset.meta.names("action") == list(JOINTS)
    assert dataset.meta.tasks == {0: task_of(0), 1: task_of(1)}
    for frame, (episode, k) in enumerate(all_frames()):
        found = dataset.sample(frame, 1)
        assert (found.episode, found.frame, found.task) == (episode, frame, task_of(episode))
        np.testing.assert_array_equal(found.state, numbers["state"][episode][k])
        np.testing.assert_array_equal(found.actions, numbers["action"][episode][k][None])
        for camera, size in SIZES.items():
            np.testing.assert_array_equal(found.images[camera], image_of(episode, k, size))


def test_video_comes_back_with_a_small_error_and_no_frame_off(write: Write) -> None:
    dataset = LeRobotDataset(write(use_video=True))
    order = np.random.default_rng(0).permutation(len(dataset))
    for frame in order:
        episode, k = all_frames()[frame]
        for camera, found in dataset.images(int(frame)).items():
            error = np.abs(found.astype(int) - image_of(episode, k, SIZES[camera]))
            # the next frame differs by 10 on average
            assert error.mean() < 3.0, (frame, camera)


@pytest.mark.parametrize("use_video", [False, True])
def test_the_statistics_are_those_of_the_data(
    write: Write, numbers: Numbers, use_video: bool
) -> None:
    root = write(use_video=use_video, label=True)
    stats = json.loads((root / "meta/stats.json").read_text())
    for key, name in (("observation.state", "state"), ("action", "action")):
        values = np.concatenate(numbers[name]).astype(np.float64)
        assert stats[key]["count"] == [len(values)]
        np.testing.assert_allclose(stats[key]["mean"], values.mean(axis=0))
        np.testing.assert_allclose(stats[key]["std"], values.std(axis=0))
        np.testing.assert_allclose(stats[key]["q01"], np.quantile(values, 0.01, axis=0))
        np.testing.assert_allclose(stats[key]["q99"], np.quantile(values, 0.99, axis=0))
    labels = np.concatenate(numbers["label"]).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(stats["action_chunk"]["q90"], np.quantile(labels, 0.9, axis=0))
    pixels = np.concatenate([image_of(e, k, SIZES["high"]).reshape(-1, 3) for e, k in all_frames()])
    found = np.array(stats["observation.images.high"]["mean"])
    assert found.shape == (3, 1, 1)
    np.testing.assert_allclose(found.ravel(), pixels.mean(axis=0) / 255, atol=1e-6)


def test_the_tables_of_episodes_and_files_are_lerobots(write: Write) -> None:
    root = write(use_video=True)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 10
    counts = (info["total_episodes"], info["total_frames"], info["total_tasks"])
    assert counts == (3, 14, 2) and info["splits"] == {"train": "0:3"}
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [row["dataset_from_index"] for row in rows] == [0, 5, 6]
    assert [row["tasks"] for row in rows] == [[task_of(0)], [task_of(1)], [task_of(0)]]
    key = "videos/observation.images.wrist"
    spans = [(row[f"{key}/from_timestamp"], row[f"{key}/to_timestamp"]) for row in rows]
    np.testing.assert_allclose(spans, [(0.0, 0.5), (0.5, 0.6), (0.6, 1.4)])
    assert (root / "videos/observation.images.wrist/chunk-000/file-000.mp4").is_file()


def test_many_small_files_are_one_dataset(
    write: Write, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "DATA_FILE_MB", 0)
    monkeypatch.setattr(layout, "VIDEO_FILE_MB", 0)
    monkeypatch.setattr(layout, "FILES_PER_CHUNK", 2)
    root = write(use_video=True)
    assert sorted(p.relative_to(root).as_posix() for p in (root / "data").rglob("*.parquet")) == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    ]
    # the encoder holds some frames back, so that the size is known a little late
    assert len(list((root / "videos/observation.images.high").rglob("*.mp4"))) >= 2
    dataset = LeRobotDataset(root)
    np.testing.assert_array_equal(dataset.state, np.concatenate(numbers["state"]))
    error = np.abs(dataset.images(13)["high"].astype(int) - image_of(2, 7, SIZES["high"]))
    assert error.mean() < 3.0


def test_a_repeated_image_is_stored_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    features = Features({"top": (64, 64)}, JOINTS, JOINTS, {"n": Extra((1,), "int64")})
    with DatasetWriter(tmp_path / "d", 10, features) as writer:
        for k in range(40):
            images = {"top": noise + np.uint8(k // 20)} if k % 20 == 0 else None
            writer.add_frame(images, [0, 0, 0], [0, 0, 0], f"task {k % 4}", {"n": [k]})
        writer.end_episode()
    dataset = LeRobotDataset(tmp_path / "d")
    one = len(encode(noise))
    assert (tmp_path / "d/data/chunk-000/file-000.parquet").stat().st_size < 2 * one + 20_000
    np.testing.assert_array_equal(dataset.images(19)["top"], noise)
    np.testing.assert_array_equal(dataset.images(39)["top"], noise + np.uint8(1))
    assert dataset.extra("n").tolist() == list(range(40)) and dataset.task(39) == "task 3"


def test_an_encoded_image_is_stored_unchanged(tmp_path: Path) -> None:
    encoded = encode(image_of(0, 3, (16, 16)))
    with DatasetWriter(tmp_path / "d", 10, Features({"top": (16, 16)}, JOINTS, JOINTS)) as writer:
        writer.add_frame({"top": encoded}, [0, 0, 0], [0, 0, 0], "wave")
        writer.end_episode()
    dataset = LeRobotDataset(tmp_path / "d")
    np.testing.assert_array_equal(dataset.images(0)["top"], image_of(0, 3, (16, 16)))


GOOD: dict[str, Any] = {
    "images": {"top": np.zeros((8, 8, 3), np.uint8)},
    "state": [0, 0, 0],
    "action": [0, 0, 0],
    "task": "wave",
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": [0, 0]}, "'observation.state' must have shape"),
        ({"action": [0, np.nan, 0]}, "'action' is not finite"),
        ({"task": "  "}, "needs an instruction"),
        ({"images": {}}, r"camera \['top'\] is missing"),
        ({"images": GOOD["images"] | {"side": 0}}, r"camera \['side'\] is not one"),
        ({"images": {"top": np.zeros((8, 9, 3), np.uint8)}}, "needs uint8 RGB"),
        ({"images": {"top": np.zeros((8, 8, 3))}}, "float64"),
        ({"images": None}, "first frame of an episode needs images"),
        ({"extra": {"x": [1]}}, r"feature \['x'\] is not one"),
    ],
)
def test_a_bad_frame_is_rejected_and_the_episode_continues(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with DatasetWriter(tmp_path / "d", 10, Features({"top": (8, 8)}, JOINTS, JOINTS)) as writer:
        with pytest.raises(DatasetError, match=reason):
            writer.add_frame(**(GOOD | change))
        writer.add_frame(**GOOD)
        writer.end_episode()
    assert len(LeRobotDataset(tmp_path / "d")) == 1


def test_nothing_is_left_of_a_recording_that_failed(tmp_path: Path) -> None:
    features = Features({"top": (8, 8)}, JOINTS, JOINTS, use_video=True)
    with pytest.raises(KeyError), DatasetWriter(tmp_path / "d", 10, features) as writer:
        writer.add_frame(**GOOD)
        writer.end_episode()
        assert not (tmp_path / "d").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_or_empty_dataset_is_not_closed(tmp_path: Path) -> None:
    features = Features({"top": (8, 8)}, JOINTS, JOINTS)
    with (
        pytest.raises(DatasetError, match="no episode"),
        DatasetWriter(tmp_path / "d", 10, features),
    ):
        pass
    with (
        pytest.raises(DatasetError, match="1 frames lack end_episode"),
        DatasetWriter(tmp_path / "d", 10, features) as writer,
    ):
        writer.add_frame(**GOOD)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_written_to(write: Write) -> None:
    root = write()
    with pytest.raises(FileExistsError, match="exists"):
        DatasetWriter(root, 10, Features({}, JOINTS, JOINTS))
    with pytest.raises(DatasetError, match="positive whole number"):
        DatasetWriter(root.with_name("other"), 12.5, Features({}, JOINTS, JOINTS))  # type: ignore[arg-type]
    assert len(LeRobotDataset(root)) == sum(LENGTHS)


def test_tasks_are_stored_as_pandas_stores_an_index(tmp_path: Path) -> None:
    """LeRobot reads them with pandas and takes the index."""
    write_tasks(tmp_path / "tasks.parquet", ["wave", "go home"])
    metadata = json.loads(pq.read_schema(tmp_path / "tasks.parquet").metadata[b"pandas"])
    assert metadata["index_columns"] == ["task"]
    assert read_tasks(tmp_path / "tasks.parquet") == {0: "wave", 1: "go home"}
