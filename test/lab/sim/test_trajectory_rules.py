"""Pins each rule by which joint_trajectory_controller refuses a trajectory, with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pi05_lab.sim.trajectory_rules import Trajectory, check_trajectory

JOINTS = ("shoulder", "elbow", "wrist")
NOW = 100.0


def trajectory(**changes: Any) -> Trajectory:
    good = Trajectory(
        joint_names=JOINTS,
        stamp_s=NOW,
        times_from_start_s=[0.0, 0.1, 0.2],
        positions=np.arange(9.0).reshape(3, 3),
        velocities=np.array([[1.0] * 3, [1.0] * 3, [0.0] * 3]),
        accelerations=np.zeros((3, 3)),
    )
    return replace(good, **changes)


NAN = np.full((3, 3), np.nan)
BROKEN = [
    ({"joint_names": JOINTS[:2]}, "2 joints are given, the controller has 3"),
    ({"joint_names": ()}, "0 joints"),
    ({"joint_names": ("shoulder", "elbow", "gripper")}, "'gripper' is not one of"),
    ({"joint_names": ("shoulder", "elbow", "elbow")}, "'elbow'|'wrist'"),
    ({"times_from_start_s": [], "positions": np.empty((0, 3))}, "empty"),
    ({"times_from_start_s": [0.0, 0.1, 0.1]}, "strictly increasing between points 1 and 2"),
    ({"times_from_start_s": [0.0, 0.2, 0.1]}, "strictly increasing between points 1 and 2"),
    ({"times_from_start_s": [0.0, np.nan, 0.2]}, "times_from_start is not finite at point 1"),
    ({"positions": np.zeros((3, 2))}, "positions has shape"),
    ({"positions": np.zeros((2, 3))}, "positions has shape"),
    ({"positions": [[0, 0, 0], [0, 0], [0, 0, 0]]}, "positions is not an array"),
    ({"positions": NAN}, "positions is not finite at point 0"),
    ({"velocities": np.zeros((3, 2))}, "velocities has shape"),
    ({"velocities": NAN}, "velocities is not finite"),
    ({"velocities": np.array([[0, 0, 0], [0, 0, 0], [0, -0.01, 0]])}, "zero for joint elbow"),
    ({"accelerations": np.zeros((3, 4))}, "accelerations has shape"),
    ({"accelerations": NAN}, "accelerations is not finite"),
    ({"velocities": None}, "accelerations are given without velocities"),
    ({"stamp_s": NOW - 0.3}, "ends in the past, 0.100 s ago"),
    ({"stamp_s": np.inf}, "stamp is not finite"),
]


@pytest.mark.parametrize(("changes", "reason"), BROKEN)
def test_each_rule_has_its_reason(changes: dict[str, Any], reason: str) -> None:
    found = check_trajectory(trajectory(**changes), JOINTS, NOW)
    assert found is not None
    assert any(part in found for part in reason.split("|")), found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"joint_names": ("wrist", "shoulder", "elbow")},
        {"stamp_s": 0.0},
        {"stamp_s": NOW - 0.15},
        {"stamp_s": NOW + 10.0},
        {"accelerations": None},
        {"accelerations": None, "velocities": None},
        {"velocities": np.array([[1.0] * 3, [1.0] * 3, [1e-7] * 3])},
        {"times_from_start_s": [0.1, 0.2, 0.3]},
    ],
)
def test_what_the_controller_takes(changes: dict[str, Any]) -> None:
    assert check_trajectory(trajectory(**changes), JOINTS, NOW) is None


def test_one_point_is_enough() -> None:
    point = Trajectory(JOINTS, 0.0, [0.5], np.zeros((1, 3)))
    assert check_trajectory(point, JOINTS, NOW) is None


def test_a_moving_end_can_be_allowed() -> None:
    moving = trajectory(velocities=np.ones((3, 3)))
    assert check_trajectory(moving, JOINTS, NOW) is not None
    allowed = check_trajectory(moving, JOINTS, NOW, allow_nonzero_velocity_at_trajectory_end=True)
    assert allowed is None
