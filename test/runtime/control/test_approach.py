"""Faults pinned: an arm that rushes at full speed to where the policy thinks it is, a refusal that
does not name the joint, a gripper that is taken for a danger."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.control.speed import StartRamp
from pi05_ros.types import JointGroup, JointSpec

JOINTS = JointGroup(
    [
        JointSpec("waist", -3.0, 3.0, 2.0, 10.0),
        JointSpec("elbow", -3.0, 3.0, 1.0, 10.0),
        JointSpec("grip", 0.0, 0.06, 0.15, 2.0, gripper=True),
    ]
)
HERE = np.array([0.0, 0.5, 0.0])


def there(waist: float, elbow: float, grip: float = 0.0) -> np.ndarray:
    """So far from here."""
    return HERE + np.array([waist, elbow, grip])


def test_a_near_target_is_followed_at_once() -> None:
    approach = StartRamp(JOINTS)
    target = there(0.5, -0.5, 0.06)
    assert approach.begin(HERE, target, 10.0) is None
    course = np.tile(target, (3, 1))
    assert approach.course(np.array([10.02, 10.04, 10.06]), course) is course


def test_a_far_target_is_refused_by_name() -> None:
    approach = StartRamp(JOINTS, "refuse")
    refusal = approach.begin(HERE, there(0.6, -1.0), 10.0)
    assert refusal is not None
    assert "'elbow' is at 0.500 and would go to -0.500, limit 0.5" in refusal
    assert "faults.first_command" in refusal


@given(
    away=st.tuples(*[st.floats(-5.0, 5.0)] * 2),
    speed=st.floats(0.05, 1.0),
)
def test_a_ramp_keeps_its_share_of_the_velocity_limits(
    away: tuple[float, float], speed: float
) -> None:
    approach = StartRamp(JOINTS, "ramp", 0.5, speed)
    target = there(*away, 0.06)
    assert approach.begin(HERE, target, 10.0) is None
    far = max(np.abs(away)) > 0.5
    times_s = np.linspace(10.0, 14.999, 5000)
    course = approach.course(times_s, np.tile(target, (len(times_s), 1)))
    assert (course[:, 2] == target[2]).all()
    if far:
        velocity = np.abs(np.diff(course[:, :2], axis=0)) / 0.001
        assert (velocity <= speed * JOINTS.max_velocity[:2] + 1e-6).all()
        assert np.allclose(course[0, :2], HERE[:2])
    arrived = approach.course(np.array([1000.0]), target[None])
    assert (arrived == target).all()


@pytest.mark.parametrize(
    ("mode", "distance", "speed", "message"),
    [
        ("jump", 0.5, 0.2, "ramp, refuse"),
        ("ramp", -1.0, 0.2, "first_command_distance"),
        ("ramp", 0.5, 0.0, "first_command_speed"),
    ],
)
def test_other_values_are_refused(mode: str, distance: float, speed: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StartRamp(JOINTS, mode, distance, speed)
