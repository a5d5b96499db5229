"""Pins: an evaluation with other limits than the node's, and faults of a file that pass unseen."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from pi05_ros.config import JointParameters, PolicyParameters, SchedulerParameters, joint_group
from pi05_ros.evaluation.robot_config import (
    ControlConfig,
    RobotConfigError,
    SchedulerConfig,
    read_robot_config,
)

ALOHA = Path(__file__).parents[2] / "config" / "aloha.yaml"


def test_the_shipped_file_means_the_same_to_the_node() -> None:
    robot = read_robot_config(ALOHA)
    parameters = yaml.safe_load(ALOHA.read_text())["/**/policy"]["ros__parameters"]
    blocks = parameters["joints"]
    theirs = joint_group({name: JointParameters(**blocks[name]) for name in blocks["names"]})
    assert robot.joints.joints == theirs.joints
    assert robot.controllers == {
        "left_arm_controller": [*range(7)],
        "right_arm_controller": [*range(7, 14)],
    }
    assert robot.scheduler.method == parameters["scheduler"]["method"]
    assert robot.camera_rate_hz == 30.0


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(ControlConfig(), PolicyParameters()), (SchedulerConfig(), SchedulerParameters())],
)
def test_defaults_are_the_nodes(mine: Any, theirs: Any) -> None:
    for entry in fields(mine):
        default = getattr(theirs, entry.name)
        expected = tuple(filter(None, default)) if isinstance(default, list) else default
        assert getattr(mine, entry.name) == expected, entry.name


def test_every_parameter_of_the_scheduler_is_read() -> None:
    mine, theirs = ({f.name for f in fields(c)} for c in (SchedulerConfig, SchedulerParameters))
    assert mine == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_velocity: 2.0", "max_velocity: fast"), "left_waist: max_velocity must be a number"),
        (("names:\n        - left_waist", "names:\n        - waist"), "joints.waist must be"),
        (("- right_gripper\n", "\n"), "right_arm_controller.joints must be"),
        (("joints: [left_waist, ", "joints: ["), "exactly one"),
        (("method: temporal_ensemble", "method: best"), "scheduler: .*'best'"),
        (("ensemble_m: 0.01", "ensemble_m: few"), "scheduler.ensemble_m must be a number"),
        (("ensemble_m: 0.01", "newest_only: 3"), "scheduler.newest_only must be a list of names"),
        (("ensemble_m: 0.01", "ensemble_max_chunks: 0"), "scheduler: "),
        (("control_rate_hz: 50.0", "control_rate_hz: 0"), "control_rate_hz must be above 0"),
        (("joints:\n      names", "joints: [\n      names"), "not valid YAML"),
        (("    joints:\n      names", "    joint:\n      names"), "ros__parameters with joints"),
    ],
)
def test_a_fault_is_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "robot.yaml"
    text = ALOHA.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change, 1))
    with pytest.raises(RobotConfigError, match="robot.yaml.*" + message):
        read_robot_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RobotConfigError, match=r"nowhere\.yaml cannot be read"):
        read_robot_config(tmp_path / "nowhere.yaml")
