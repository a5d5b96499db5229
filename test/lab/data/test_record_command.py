"""`pi05 record` from end to end. Faults pinned: options that do nothing, and what is left behind
after a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import CUBES_KEY, PICTURE_KEY
from pi05_lab.data.simulated import Frame, SimulatedRecorder
from pi05_ros.cli import main


def record(*arguments: object) -> int:
    return main(["record", "--size", "32", "24", "--workers", "1", *map(str, arguments)])


def test_states_become_a_dataset_to_train_on(tmp_path: Path) -> None:
    output = tmp_path / "made" / "data"
    assert record("--output", output, "--episodes", 3, "--states", "--instructions", 2) == 0
    dataset = LeRobotDataset(output)
    assert dataset.cameras == ("cam_high", "cam_left_wrist", "cam_right_wrist")
    assert dataset.meta.robot_type == "aloha_sim"
    assert dataset.meta.names("action")[6] == "left_gripper"
    assert len(dataset.episodes) == 3 and dataset.sample(0, 50).actions.shape == (50, 14)
    numbers = dataset.extra(PICTURE_KEY)
    assert numbers.tolist() == [k // 2 for k in range(len(dataset))]
    for frame in (0, 2, len(dataset) - 2):
        first, second = dataset.sample(frame, 50), dataset.sample(frame + 1, 50)
        assert first.task != second.task
        for camera in dataset.cameras:
            np.testing.assert_array_equal(first.images[camera], second.images[camera])
    # cubes lie on the table or are in a hand above it
    assert dataset.extra(CUBES_KEY)[:, 2::3].min() > 0.015


def test_a_task_becomes_a_bag_with_the_nodes_topics(tmp_path: Path) -> None:
    options = ("--tasks", "home", "--format", "mcap", "--episodes", 1, "--fps", 10)
    assert record("--output", tmp_path / "bags", *options) == 0
    with AnyReader([tmp_path / "bags/episode_000000"]) as reader:
        counts = {topic: info.msgcount for topic, info in reader.topics.items()}
        connections = [c for c in reader.connections if c.topic == "/joint_states"]
        states = [reader.deserialize(d, c.msgtype) for c, _, d in reader.messages(connections)]
    frames = counts["/joint_states"]
    assert frames >= 5 and counts["/instruction"] >= 1
    for topic in ("/cam_high/image_raw", "/left_arm_controller/joint_trajectory"):
        assert counts[topic] == frames
    # metres, not the policy's 0 to 1
    assert 0.015 < states[0].position[6] < 0.06


def test_video_is_written_on_request(tmp_path: Path) -> None:
    options = ("--tasks", "home", "--episodes", 1, "--fps", 10, "--video", "--labels", "chunk")
    assert record("--output", tmp_path / "data", *options) == 0
    assert (tmp_path / "data/videos/observation.images.cam_high/chunk-000/file-000.mp4").is_file()
    dataset = LeRobotDataset(tmp_path / "data")
    assert dataset.sample(len(dataset) - 1, 50).images["cam_high"].shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tasks", "jump"), "tasks must be different ones of"),
        (("--tasks", "pick=often"), "'often' is not a weight of 'pick'"),
        (("--format", "mcap", "--states"), "a bag holds whole episodes"),
        (("--video", "--states"), "only PNG stores once"),
        (("--fps", 30), "fps must divide 50"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], reason: str
) -> None:
    assert record("--output", tmp_path / "data", *arguments) == 1
    assert reason in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["lerobot", "mcap"])
def test_a_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    record_episode = SimulatedRecorder.__call__

    def fail(recorder: SimulatedRecorder, number: int) -> list[Frame]:
        if number == 1:
            raise RuntimeError("the simulation diverged")
        return record_episode(recorder, number)

    monkeypatch.setattr(SimulatedRecorder, "__call__", fail)
    options = ("--tasks", "home", "--episodes", 2, "--fps", 10, "--format", form)
    assert record("--output", tmp_path / "data", *options) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--episodes", "--workers"])
def test_a_count_of_0_is_a_usage_error(tmp_path: Path, option: str) -> None:
    assert record("--output", tmp_path / "data", option, 0) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").write_text("keep")
    assert record("--output", tmp_path / "data") == 1
    assert (tmp_path / "data/mine").read_text() == "keep"
