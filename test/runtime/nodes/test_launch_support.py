"""Launch arguments are refused before anything starts, and a process's end has a meaning.

Pins: `sim:=maybe` that left an active policy node without its launch; a missing or malformed params
file that was not named; a replay that played topics which the bag does not have, that found a
missing bag after the warm-up, and that waited for ever for a node that cannot start.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi05_lab.data.bags import BagWriter
from pi05_lab.data.robot_bag import RobotBagWriter
from pi05_lab.evaluation.open_loop.replay import plan_replay
from pi05_ros.nodes import EXIT_DEVICE
from pi05_ros.nodes.launch_support import (
    RESPAWN_WINDOW_S,
    RESPAWNS,
    AfterExit,
    Ending,
    LaunchFaults,
    aloha_faults,
)
from pi05_ros.nodes.main import share_directory

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
PARAMS = str(share_directory() / "config" / "aloha.yaml")
ALOHA = {
    "sim": "true",
    "checkpoint": "",
    "params_file": PARAMS,
    "namespace": "",
    "use_sim_time": "false",
    "dry_run": "false",
    "instruction": "",
    "autostart": "true",
}
REPLAY = {
    "bag": "",
    "rate": "1.0",
    "loop": "false",
    "checkpoint": "",
    "params_file": PARAMS,
    "namespace": "",
    "dry_run": "true",
    "instruction": "",
}


@pytest.fixture(autouse=True)
def ros2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that plays bags is on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ros2").write_text("#!/bin/sh\n")
    (folder / "ros2").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_defaults_are_right() -> None:
    assert aloha_faults(ALOHA) == []


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("sim", "maybe", "neither true nor false"),
        ("dry_run", "", "neither true nor false"),
        ("autostart", "yes", "neither true nor false"),
        ("use_sim_time", "1", "neither true nor false"),
        ("params_file", "/no/such.yaml", "does not exist"),
        ("params_file", "/tmp", "not a file"),
        ("checkpoint", "/no/such", "is not there"),
        ("checkpoint", "./no/such", "is not there"),
        ("checkpoint", PARAMS, "is not a folder"),
        ("checkpoint", "/tmp", "no config.json"),
        ("namespace", "left arm", "no ROS namespace"),
        ("namespace", "a//b", "no ROS namespace"),
        ("namespace", "1robot", "no ROS namespace"),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_name_and_value(
    argument: str, value: str, words: str
) -> None:
    (line,) = aloha_faults(ALOHA | {argument: value})
    assert line.startswith(f"{argument}:={value}") and words in line and "\n" not in line


def test_every_wrong_argument_is_named_at_once() -> None:
    faults = aloha_faults(ALOHA | {"sim": "no", "checkpoint": "/no", "namespace": "-"})
    assert [line.partition(":=")[0] for line in faults] == ["sim", "checkpoint", "namespace"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("checkpoint", "small"),
        ("checkpoint", "lerobot/pi05_base@main"),
        ("namespace", "robot"),
        ("namespace", "/lab/robot_2"),
        ("namespace", "/"),
        ("sim", "False"),
    ],
)
def test_what_ros_and_the_node_take_is_accepted(argument: str, value: str) -> None:
    assert aloha_faults(ALOHA | {argument: value}) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policy: [", "not valid YAML"),
        ("- a\n", "no node with ros__parameters"),
        ("", "no node with ros__parameters"),
        ("a: &a [*a]", "no node with ros__parameters"),
        ("x: \x00", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
    ],
)
def test_a_malformed_params_file_is_one_line_with_its_path(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "robot.yaml"
    file.write_text(text)
    (line,) = aloha_faults(ALOHA | {"params_file": str(file)})
    assert str(file) in line and words in line and "\n" not in line


def compressed_bag(path: Path) -> Path:
    """Topics as `pi05 demo --bag` records them."""
    writer = BagWriter(path)
    for camera in CAMERAS:
        topic = f"/{camera}/image_raw/compressed"
        writer.write(topic, "sensor_msgs/msg/CompressedImage", 1, b"\x00" * 16)
    writer.write("/joint_states", "sensor_msgs/msg/JointState", 2, b"\x00" * 16)
    writer.write("/instruction", "std_msgs/msg/String", 3, b"\x00" * 16)
    writer.close()
    return path


def raw_bag(path: Path, joints: int = 14) -> Path:
    names = [f"joint_{n}" for n in range(joints)]
    image = np.zeros((8, 8, 3), np.uint8)
    with RobotBagWriter(path, names, {"arm": names}, 0.02) as bag:
        zeros = np.zeros(joints)
        bag.write(1.0, dict.fromkeys(CAMERAS, image), zeros, zeros, zeros, "wave")
    return path


def test_the_demos_compressed_images_are_played_and_read(tmp_path: Path) -> None:
    replay = plan_replay(REPLAY | {"bag": str(compressed_bag(tmp_path / "bag"))})
    assert replay.topics == [
        *(f"/{camera}/image_raw/compressed" for camera in CAMERAS),
        *("/joint_states", "/instruction"),
    ]
    assert replay.transports == {f"cameras.{camera}.transport": "compressed" for camera in CAMERAS}


def test_raw_images_are_played_and_read_raw(tmp_path: Path) -> None:
    replay = plan_replay(
        REPLAY | {"bag": str(raw_bag(tmp_path / "bag")), "instruction": "wave with the right arm"}
    )
    assert replay.topics == [*(f"/{camera}/image_raw" for camera in CAMERAS), "/joint_states"]
    assert set(replay.transports.values()) == {"raw"}


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast", "0.001", ""])
def test_a_rate_that_plays_nothing_is_refused(tmp_path: Path, rate: str) -> None:
    bag = compressed_bag(tmp_path / "bag")
    with pytest.raises(LaunchFaults) as faults:
        plan_replay(REPLAY | {"bag": str(bag), "rate": rate})
    (line,) = faults.value.lines
    assert line.startswith(f"rate:={rate} ")


def test_a_missing_bag_and_command_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(LaunchFaults) as faults:
        plan_replay(REPLAY | {"bag": str(tmp_path / "none")})
    command, bag = faults.value.lines
    assert "ros2" in command and "source ROS" in command
    assert bag.startswith(f"bag:={tmp_path / 'none'}")


def test_topics_that_the_bag_does_not_have_are_named_with_those_it_has(tmp_path: Path) -> None:
    bag = compressed_bag(tmp_path / "bag")
    with pytest.raises(LaunchFaults) as faults:
        plan_replay(REPLAY | {"bag": str(bag), "namespace": "robot"})
    text = "\n".join(faults.value.lines)
    assert "camera cam_high: none of /robot/cam_high/image_raw" in text
    assert "no /robot/joint_states" in text and "has /cam_high/image_raw/compressed" in text


def test_only_a_device_error_starts_the_node_again() -> None:
    exits = Ending()
    assert exits.after(0, 0.0) is AfterExit.END
    for code in (1, 2, -6, -9, -11, 3):
        assert exits.after(code, 0.0) is AfterExit.FAIL
    assert exits.after(EXIT_DEVICE, 0.0) is AfterExit.RESPAWN


def test_a_device_that_keeps_failing_ends_the_launch() -> None:
    exits = Ending()
    for second in range(RESPAWNS):
        assert exits.after(EXIT_DEVICE, float(second)) is AfterExit.RESPAWN
    assert exits.after(EXIT_DEVICE, 10.0) is AfterExit.FAIL
    assert exits.after(EXIT_DEVICE, RESPAWN_WINDOW_S + 10.0) is AfterExit.RESPAWN


def test_a_replay_does_not_start_the_node_again() -> None:
    assert Ending(respawns=0).after(EXIT_DEVICE, 0.0) is AfterExit.FAIL
