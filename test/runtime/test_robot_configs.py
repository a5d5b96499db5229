"""The robots' params files; fault: joints, cameras or keys that the robot's description lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pi05_ros.config import (
    CameraParameters,
    ControllerParameters,
    GuidanceParameters,
    JointParameters,
    PolicyParameters,
    SchedulerParameters,
    controller_columns,
    joint_group,
)
from pi05_ros.policy.robots import read_robot

CONFIG = Path(__file__).parents[2] / "config"


def named(group: dict[str, Any], declaration: Any) -> dict[str, Any]:
    """The blocks of `names`; a key that nothing declares is a TypeError."""
    assert set(group) == {"names", *group["names"]}
    return {name: declaration(**group[name]) for name in group["names"]}


@pytest.mark.parametrize("name", ["aloha", "droid", "ur5e", "generic"])
def test_params_files_fit_their_robot(name: str) -> None:
    document = yaml.safe_load((CONFIG / f"{name}.yaml").read_text(encoding="utf-8"))
    values = document["/**/policy"]["ros__parameters"]
    cameras = named(values.pop("cameras"), CameraParameters)
    joints = joint_group(named(values.pop("joints"), JointParameters))
    columns = controller_columns(named(values.pop("controllers"), ControllerParameters), joints)
    SchedulerParameters(**values.pop("scheduler", {}))
    GuidanceParameters(**values.pop("guidance", {}))
    parameters = PolicyParameters(**values)
    robot = parameters.robot
    description = read_robot(CONFIG / robot if robot.endswith(".yaml") else robot)
    assert len(joints) == len(description.state) == len(description.action)
    assert sorted(i for part in columns.values() for i in part) == list(range(len(joints)))
    assert set(cameras) == set(description.cameras)
    grippers = [i for i, joint in enumerate(description.action) if joint in description.grippers]
    assert list(joints.gripper.nonzero()[0]) == grippers
