"""Bags as training data; faults: numbers of another time or unit, frames that vanish in silence,
episodes with gaps, all bags lost to one damaged bag, a stopped conversion that starts over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from offline_world import (  # type: ignore[import-not-found]
    PARAMS,
    START_S,
    TYPES,
    grey_image,
    motion,
    rewrite,
    write_bag,
    write_params,
)
from rosbags.rosbag2 import StoragePlugin, Writer

from pi05_lab.data import convert
from pi05_lab.data.bags import Bag, Notes
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.cli import main

FPS = 25
UNITS = (1.0, 1.0, 0.04)
Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """`pi05 convert`; its exit code and all that it prints, on one line."""
    params = write_params(tmp_path)

    def call(*arguments: object) -> tuple[int, str]:
        given = ["convert", *map(str, arguments), "--params-file", str(params)]
        code = main(given if "--fps" in given else [*given, "--fps", str(FPS)])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    return call


def check_numbers(data: LeRobotDataset, first_s: float = 0.0, lag_s: float = 0.0) -> None:
    """Actions are the commands at the frames' times, states the joints' positions then."""
    for episode in data.episodes:
        begin, end = data.bounds(int(episode))
        times_s = START_S + first_s + np.arange(end - begin) / FPS
        np.testing.assert_allclose(data.action[begin:end], motion(times_s) / UNITS, atol=2e-3)
        measured = motion(times_s - lag_s) / UNITS
        np.testing.assert_allclose(data.state[begin:end], measured, atol=2e-3)
        first_s += (end - begin) / FPS


def test_a_bag_becomes_an_episode_per_instruction(tmp_path: Path, run: Convert) -> None:
    bag = write_bag(tmp_path / "bag", 6.0, lambda t: "wave" if t < 2 else "stop", servo_lag_s=0.06)
    code, shown = run(bag, tmp_path / "data", "--no-video")
    assert code == 0 and "2 episodes" in shown
    data = LeRobotDataset(tmp_path / "data")
    assert data.fps == FPS and data.meta.robot_type == "aloha"
    assert data.meta.names("action") == ["shoulder", "elbow", "gripper"]
    assert [data.task(data.bounds(k)[0]) for k in (0, 1)] == ["wave", "stop"]
    assert len(data) == 6 * FPS
    check_numbers(data, lag_s=0.06)
    for k in (0, 30, 120):
        np.testing.assert_array_equal(data.images(k)["top"], grey_image(2 * k))
    assert run(bag, tmp_path / "data")[1].count("output folder exists") == 1
    assert run(bag, tmp_path / "whole", "--episodes", "bag", "--no-video")[0] == 0
    whole = LeRobotDataset(tmp_path / "whole")
    assert whole.episodes.tolist() == [0] and whole.task(0) == "wave"
    assert whole.task(len(whole) - 1) == "stop"


def test_options(tmp_path: Path, run: Convert) -> None:
    """An instruction, measured actions, scaled images, video."""
    bag = write_bag(tmp_path / "bag", 3.0, lambda t: "wave" if t < 1 else "stop", servo_lag_s=0.1)
    code, _ = run(
        bag, tmp_path / "data", "--instruction", "go", "--action", "measured", "--size", 32, 24
    )
    assert code == 0
    data = LeRobotDataset(tmp_path / "data")
    assert data.meta.tasks == {0: "go"} and data.episodes.tolist() == [0]
    np.testing.assert_array_equal(data.action[:-1], data.state[1:])
    expected = cv2.resize(grey_image(100), (32, 24), interpolation=cv2.INTER_AREA)
    assert data.images(50)["top"].shape == (24, 32, 3)
    assert np.abs(data.images(50)["top"].astype(int) - expected).mean() < 3
    assert data.meta.features["observation.images.top"]["dtype"] == "video"


@pytest.mark.parametrize("kind", ["jpeg", "sqlite3"])
def test_every_kind_of_bag(tmp_path: Path, run: Convert, kind: str) -> None:
    bag = write_bag(tmp_path / "raw", 2.0)
    jpeg = TYPES.types["sensor_msgs/msg/CompressedImage"]

    def compress(topic: str, k: int, message: Any) -> Any:
        if topic != "/top/image_raw":
            return message
        data = cv2.imencode(".jpg", message.data.reshape(12, 16, 3)[..., ::-1])[1].ravel()
        kind = "sensor_msgs/msg/CompressedImage"
        return f"{topic}/compressed", kind, jpeg(message.header, "jpeg", data)

    if kind == "jpeg":
        bag = rewrite(bag, tmp_path / "bag", compress)
    else:
        bag = to_sqlite(bag, tmp_path / "bag")
    code, shown = run(bag, tmp_path / "data", "--no-video")
    assert code == 0, shown
    check_numbers(LeRobotDataset(tmp_path / "data"))


def to_sqlite(source: Path, target: Path) -> Path:
    bag = Bag(source, Notes())
    with Writer(target, version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=TYPES)
            for topic, kind in bag.topics.items()
        }
        for message in bag.messages(bag.topics):
            writer.write(connections[message.topic], message.receive_ns, message.data)
    return target


def test_dropped_frames_are_counted_and_split_an_episode(tmp_path: Path, run: Convert) -> None:
    """A camera that pauses for 1 s, an image that cannot be decoded, a short rest."""

    def change(topic: str, k: int, message: Any) -> Any:
        t = k / 50
        if topic != "/top/image_raw":
            return message
        if k == 350:
            message.encoding = "16UC1"
        return None if 2 <= t < 3 else message

    bag = rewrite(write_bag(tmp_path / "whole", 10.0), tmp_path / "bag", change)
    code, shown = run(bag, tmp_path / "data", "--no-video")
    assert code == 0
    data = LeRobotDataset(tmp_path / "data")
    lengths = [end - begin for begin, end in (data.bounds(int(e)) for e in data.episodes)]
    # images may be 0.2 s old: 2.2 s, from 3 s to the damaged one at 7 s, and the rest
    assert lengths == [55, 100, 74]
    assert "frames dropped: camera 'top': newest is 0.220 s old" in shown
    assert "16UC1" in shown and "(20 times)" in shown
    images = data.images(55)["top"]
    np.testing.assert_array_equal(images, grey_image(150))


def test_trim_leaves_out_idle_ends(tmp_path: Path, run: Convert) -> None:
    def rest(topic: str, k: int, message: Any) -> Any:
        if topic == "/arm_controller/joint_trajectory":
            moved = min(max(k / 50, 2.0), 5.0)
            message.points[0].positions = motion(np.array([START_S + moved]))[0]
        return message

    bag = rewrite(write_bag(tmp_path / "whole", 8.0), tmp_path / "bag", rest)
    code, shown = run(bag, tmp_path / "data", "--no-video", "--trim")
    assert code == 0 and "idle beginning or end" in shown
    data = LeRobotDataset(tmp_path / "data")
    assert abs(len(data) / FPS - (3.0 + 2 * convert.IDLE_MARGIN_S)) < 0.1
    still = rewrite(bag, tmp_path / "still", lambda topic, k, m: rest(topic, 0, m))
    code, shown = run(still, tmp_path / "none", "--trim")
    assert code == 1 and "no frame can be made" in shown and "nothing was written" in shown


def test_a_damaged_bag_costs_only_itself(tmp_path: Path, run: Convert) -> None:
    """One that is cut short gives what precedes; one without joint states, or with other images,
    nothing.
    """
    good, cut, blind, other = (tmp_path / name for name in ("good", "cut", "blind", "other"))
    write_bag(good, 2.0)
    write_bag(cut, 30.0)  # some chunks
    (file,) = cut.glob("*.mcap")
    file.write_bytes(file.read_bytes()[: int(0.7 * file.stat().st_size)])
    rewrite(good, blind, lambda topic, k, m: None if topic == "/joint_states" else m)
    write_bag(other, 2.0, cameras=lambda k: {"top": np.full((20, 20, 3), k % 250, np.uint8)})
    bags = (blind, good, tmp_path / "nothing", cut, other, good)
    code, shown = run(*bags, tmp_path / "data", "--no-video")
    assert code == 1
    data = LeRobotDataset(tmp_path / "data")
    assert len(data.episodes) == 2  # the same bag twice is one
    lengths = [end - begin for begin, end in map(data.bounds, data.episodes.tolist())]
    assert lengths[0] == 50 and 100 < lengths[1] < 600
    for text in (
        f"{blind}: left out: joint states: no /joint_states",
        "nothing is not a rosbag2",
        "is cut short",
        f"{other}: left out: camera 'top' needs uint8 RGB (12, 16, 3), got uint8 (20, 20, 3)",
    ):
        assert text in shown, (text, shown)


@pytest.mark.parametrize("video", ["--video", "--no-video"])
def test_a_killed_conversion_continues(
    tmp_path: Path, run: Convert, video: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second bag: the first is not read again, and the result is the same."""
    bags = [write_bag(tmp_path / f"b{k}", 2.0 + k, lambda _, k=k: f"task {k}") for k in range(3)]
    assert run(*bags, tmp_path / "whole", video)[0] == 0
    frames = convert.BagConverter.frames
    read: list[str] = []

    def killed(self: convert.BagConverter) -> Any:
        read.append(self._bag.path.name)
        for k, frame in enumerate(frames(self)):
            if read == ["b0", "b1"] and k == 20:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(convert.BagConverter, "frames", killed)
    code, shown = run(*bags, tmp_path / "data", video)
    assert code == 1 and "repeat the command" in shown
    assert not (tmp_path / "data").exists()
    other = run(bags[1], tmp_path / "data", video)[1]
    assert "unfinished conversion with other bags" in other and "b0" in other
    assert "other features or another rate" in run(*bags, tmp_path / "data", video, "--fps", 50)[1]
    code, shown = run(*bags, tmp_path / "data", video)
    assert code == 0 and "b0: converted before" in shown
    assert read == ["b0", "b1", "b1", "b2"]
    mine, theirs = LeRobotDataset(tmp_path / "data"), LeRobotDataset(tmp_path / "whole")
    np.testing.assert_array_equal(mine.action, theirs.action)
    np.testing.assert_array_equal(mine.episode_index, theirs.episode_index)
    assert mine.meta.tasks == theirs.meta.tasks
    for k in (0, 60, 150):
        np.testing.assert_array_equal(mine.images(k)["top"], theirs.images(k)["top"])
    stats = [json.loads((tmp_path / d / "meta/stats.json").read_text()) for d in ("data", "whole")]
    assert stats[0] == stats[1]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one bag"),
        (["--action", "felt"], "'felt'"),
        (["--fps", "0"], "0"),
        (["--namespace", "/other"], "no /other/top/image_raw"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, run: Convert, arguments: list[str], message: str
) -> None:
    bags = [] if not arguments else [write_bag(tmp_path / "bag", 1.0)]
    code, shown = run(*bags, tmp_path / "data", *arguments)
    assert code != 0 and message in shown and "Traceback" not in shown
    assert not list(tmp_path.glob("data*"))


def test_a_rate_that_no_data_set_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow.yaml").write_text("base: ur5e\ndt_s: 0.03\n")
    params = tmp_path / "params.yaml"
    params.write_text(PARAMS.replace("    cameras:", "    robot: slow.yaml\n    cameras:", 1))
    bag = write_bag(tmp_path / "bag", 1.0)
    assert main(["convert", str(bag), str(tmp_path / "d"), "--params-file", str(params)]) == 1
    assert "33.333 steps per second" in " ".join(capsys.readouterr().err.split())


def test_what_was_committed_survives(tmp_path: Path) -> None:
    """A full disk in the second part; the folder of another data set is not continued."""
    from pi05_lab.data.lerobot_format import Features
    from pi05_lab.data.lerobot_writer import DatasetWriter

    features = Features({}, ["x"], ["x"])

    def add(writer: DatasetWriter, value: float) -> None:
        writer.add_frame({}, [value], [value], "go")
        writer.end_episode()

    with (
        pytest.raises(OSError, match="No space left"),
        DatasetWriter(tmp_path / "d", 10, features, resume=True) as writer,
    ):
        add(writer, 1.0)
        writer.commit("first")
        add(writer, 2.0)
        raise OSError(28, "No space left on device")
    with (
        pytest.raises(DatasetError, match="other features or another rate"),
        DatasetWriter(tmp_path / "d", 20, features, resume=True),
    ):
        pass
    with DatasetWriter(tmp_path / "d", 10, features, resume=True) as writer:
        assert writer.committed == ["first"] and writer.frames == 1
        add(writer, 3.0)
        writer.rollback()
        add(writer, 4.0)
    assert LeRobotDataset(tmp_path / "d").state.ravel().tolist() == [1.0, 4.0]
