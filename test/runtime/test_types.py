"""Faults pinned: units that do not come back, limits that are none, step times that are off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pi05_ros.types import ActionChunk, JointGroup, JointSpec

ELBOW = JointSpec("elbow", -1.0, 1.5, 2.0, 4.0)
NUMBERS = ("lower", "upper", "max_velocity", "max_acceleration", "policy_scale")
GRIPPER = JointSpec("gripper", 0.0, 0.06, 0.1, 0.5, 0.036, 0.021, gripper=True)


def test_chunk_steps_count_from_the_stamp() -> None:
    chunk = ActionChunk(np.zeros((50, 14)), stamp_s=10.0, dt_s=0.02)
    assert chunk.horizon == 50
    assert chunk.end_s == pytest.approx(10.98)


def test_joint_group_has_arrays_in_the_joints_order() -> None:
    group = JointGroup([ELBOW, GRIPPER])
    assert len(group) == 2
    assert group.names == ("elbow", "gripper")
    assert group.lower.tolist() == [-1.0, 0.0]
    assert group.upper.tolist() == [1.5, 0.06]
    assert group.max_velocity.tolist() == [2.0, 0.1]
    assert group.max_acceleration.tolist() == [4.0, 0.5]
    assert group.gripper.tolist() == [False, True]


def test_policy_units_are_offset_and_scaled() -> None:
    group = JointGroup([ELBOW, GRIPPER])
    np.testing.assert_allclose(group.to_policy(np.array([0.3, 0.057])), [0.3, 1.0])
    np.testing.assert_allclose(group.to_joints(np.array([[0.3, 0.0]])), [[0.3, 0.021]])


@given(
    scale=st.floats(0.01, 10.0) | st.floats(-10.0, -0.01),
    offset=st.floats(-5.0, 5.0),
    values=arrays(
        np.float64,
        array_shapes(max_dims=2, max_side=4).map(lambda shape: (*shape, 2)),
        elements=st.floats(-10.0, 10.0),
    ),
)
def test_units_come_back_for_any_scale(scale: float, offset: float, values: np.ndarray) -> None:
    joint = JointSpec("gripper", 0.0, 1.0, 1.0, 1.0, policy_scale=scale, policy_offset=offset)
    group = JointGroup([ELBOW, joint])
    np.testing.assert_allclose(group.to_joints(group.to_policy(values)), values, atol=1e-9)
    np.testing.assert_allclose(group.to_policy(group.to_joints(values)), values, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, 1.0, 1.0, 1.0), "lower 1.0 is not below 1.0"),
        ((2.0, 1.0, 1.0, 1.0), "is not below"),
        ((0.0, float("inf"), 1.0, 1.0), "must be finite"),
        ((float("nan"), 1.0, 1.0, 1.0), "must be finite"),
        ((0.0, 1.0, 0.0, 1.0), "limits must be > 0"),
        ((0.0, 1.0, 1.0, -1.0), "limits must be > 0"),
        ((0.0, 1.0, 1.0, 1.0, 0.0), "policy_scale must not be 0"),
    ],
)
def test_a_joint_that_cannot_be_limited_is_refused_by_name(
    values: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"joint 'wrist': .*{message}"):
        JointSpec("wrist", **dict(zip(NUMBERS, values, strict=False)))  # type: ignore[arg-type]


def test_joint_names_are_given_once_each() -> None:
    with pytest.raises(ValueError, match="once each"):
        JointGroup([])
    with pytest.raises(ValueError, match="once each"):
        JointGroup([ELBOW, ELBOW])
