"""Fault pinned: a bag whose topics, types, joint order or stamps the policy node cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rosbags.highlevel import AnyReader

from pi05_lab.data.bags import BagError
from pi05_lab.data.robot_bag import RobotBagWriter

JOINTS = ("l0", "l1", "r0", "r1")
CONTROLLERS = {"left": ("l1", "l0"), "right": ("r0", "r1")}


def image_of(k: int) -> np.ndarray:
    return np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) + np.uint8(k)


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    with RobotBagWriter(tmp_path / "bag", JOINTS, CONTROLLERS, period_s=0.02) as writer:
        for k in range(75):
            base = np.arange(4.0) + k
            text = "wave" if k < 60 else "go home"
            writer.write(1.0 + k * 0.02, {"top": image_of(k)}, base, base / 10, base + 0.5, text)
    return tmp_path / "bag"


def read(bag: Path) -> dict[str, list[tuple[int, Any]]]:
    found: dict[str, list[tuple[int, Any]]] = {}
    with AnyReader([bag]) as reader:
        for connection, stamp_ns, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            found.setdefault(connection.topic, []).append((stamp_ns, message))
    return found


def test_a_bag_is_read_back(bag: Path) -> None:
    topics = read(bag)
    assert {topic: len(messages) for topic, messages in topics.items()} == {
        "/instruction": 3,
        "/joint_states": 75,
        "/top/image_raw": 75,
        "/left/joint_trajectory": 75,
        "/right/joint_trajectory": 75,
    }
    stamp_ns, image = topics["/top/image_raw"][10]
    assert stamp_ns == 1_200_000_000
    assert (image.header.stamp.sec, image.header.stamp.nanosec) == (1, 200_000_000)
    assert (image.encoding, image.step, image.header.frame_id) == ("rgb8", 12, "top")
    np.testing.assert_array_equal(image.data.reshape(6, 4, 3), image_of(10))
    joints = topics["/joint_states"][10][1]
    assert joints.name == list(JOINTS)
    np.testing.assert_array_equal(joints.position, [10, 11, 12, 13])
    np.testing.assert_allclose(joints.velocity, [1.0, 1.1, 1.2, 1.3])
    command = topics["/left/joint_trajectory"][10][1]
    assert command.joint_names == ["l1", "l0"] and len(command.points) == 1
    np.testing.assert_array_equal(command.points[0].positions, [11.5, 10.5])
    assert command.points[0].time_from_start.nanosec == 20_000_000


def test_the_instruction_is_repeated_and_sent_at_once_when_it_changes(bag: Path) -> None:
    found = [(stamp_ns / 1e9, message.data) for stamp_ns, message in read(bag)["/instruction"]]
    assert found == [(1.0, "wave"), (2.0, "wave"), (2.2, "go home")]


def test_metadata_yaml_is_one_that_ros2_bag_reads(bag: Path) -> None:
    info = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert info["storage_identifier"] == "mcap" and info["message_count"] == 303
    assert info["version"] == 8


def test_bad_input_is_named(tmp_path: Path, bag: Path) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        RobotBagWriter(bag, JOINTS, CONTROLLERS, 0.02)
    with pytest.raises(BagError, match="left: joint 'x' is not one of"):
        RobotBagWriter(tmp_path / "other", JOINTS, {"left": ("x",)}, 0.02)
    four = np.zeros(4)
    with RobotBagWriter(tmp_path / "other", JOINTS, CONTROLLERS, 0.02) as writer:
        with pytest.raises(BagError, match="4 finite joint values"):
            writer.write(1.0, {}, four, four, four[:3], "wave")
        with pytest.raises(BagError, match="'top' needs uint8 RGB"):
            writer.write(1.0, {"top": np.zeros((4, 4))}, four, four, four, "wave")  # type: ignore[dict-item]
        writer.write(1.0, {}, four, four, four, "wave")
