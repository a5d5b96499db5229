"""Faults pinned: a URDF that widens what the parameters allow, a soft limit or a ros2_control limit
that is passed over, an entity bomb, a limit of another joint that stops a robot."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.control.urdf import UrdfError, UrdfLimits, intersect_limits, read_urdf_limits
from pi05_ros.types import JointGroup, JointSpec

LIMIT = '<limit lower="-1.5" upper="2" velocity="3" effort="9"/>'
JOINTS = JointGroup(
    [JointSpec("waist", -1.0, 1.0, 2.0, 10.0), JointSpec("finger", 0.01, 0.05, 0.2, 1.0)]
)


def urdf(inside: str = LIMIT, kind: str = "revolute", more: str = "") -> str:
    finger = '<joint name="finger" type="prismatic"><limit upper="0.04" velocity="1"/></joint>'
    return (
        f'<?xml version="1.0"?><robot name="r"><link name="a"/><joint name="waist" type="{kind}">'
        f"{inside}</joint>{finger}{more}</robot>"
    )


def ros2_control(interfaces: str, inside: str = "") -> str:
    joint = f'<joint name="waist">{inside}{interfaces}</joint><joint name="other"/>'
    return f'<ros2_control name="s" type="system">{joint}</ros2_control>'


def interface(kind: str, low: str, high: str, inside: str = "") -> str:
    params = f'<param name="min">{low}</param><param name="max">{high}</param>'
    return f'<command_interface name="{kind}">{inside}{params}</command_interface>'


def waist(text: str) -> UrdfLimits:
    return read_urdf_limits(text, JOINTS.names)["waist"]


def test_all_places_that_speak_of_a_joint_count() -> None:
    assert waist(urdf()) == UrdfLimits(-1.5, 2.0, 3.0)
    assert read_urdf_limits(urdf(), ["finger"])["finger"] == UrdfLimits(0.0, 0.04, 1.0)
    soft = '<safety_controller soft_lower_limit="-1.2" k_velocity="1"/>'
    assert waist(urdf(LIMIT + soft)) == UrdfLimits(-1.2, 2.0, 3.0)
    assert waist(urdf('<limit velocity="3"/>', "continuous")) == UrdfLimits(max_velocity=3.0)
    assert waist(urdf("", "continuous")) == UrdfLimits()
    position = interface("position", "-1", "3")
    velocity = interface("velocity", "-0.5", "0.7")
    acceleration = interface("acceleration", "-4", "4")
    effort = interface("effort", "x", "y")
    control = ros2_control(position + velocity + acceleration + effort)
    assert waist(urdf(more=control)) == UrdfLimits(-1.0, 2.0, 0.5, 4.0)
    off = '<limits enable="false"/>'
    assert waist(urdf(more=ros2_control(position, off))) == UrdfLimits(-1.5, 2.0, 3.0)
    control = ros2_control(interface("position", "-1", "1", off) + velocity)
    assert waist(urdf(more=control)) == UrdfLimits(-1.5, 2.0, 0.5)


def test_only_commanded_joints_are_judged() -> None:
    other = '<joint name="x" type="revolute"/><joint name="y"><limit velocity="?"/></joint>'
    assert waist(urdf(more=other + other)) == UrdfLimits(-1.5, 2.0, 3.0)


@given(
    *(st.floats(-5.0, 5.0), st.floats(-5.0, 5.0)),
    *(st.floats(0.001, 100.0), st.floats(0.001, 100.0)),
)
def test_the_result_allows_nothing_that_either_forbids(
    low: float, high: float, velocity: float, acceleration: float
) -> None:
    low, high = sorted((low, high))
    limits = {
        "waist": UrdfLimits(low, high, velocity, acceleration),
        "finger": UrdfLimits(),
    }
    if max(low, -1.0) >= min(high, 1.0):
        with pytest.raises(UrdfError, match="'waist': the parameters allow -1 to 1"):
            intersect_limits(JOINTS, limits)
        return
    tight = intersect_limits(JOINTS, limits)
    assert tight.lower[0] >= -1.0 and low <= tight.lower[0] < tight.upper[0] <= min(high, 1.0)
    assert tight.max_velocity[0] == min(2.0, velocity)
    assert tight.max_acceleration[0] == min(10.0, acceleration)
    assert tight.joints[1] == JOINTS.joints[1]
    np.testing.assert_array_equal(tight.to_policy(np.ones(2)), JOINTS.to_policy(np.ones(2)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not XML"),
        ("<robot>", "not XML"),
        ("<robot>\ud800</robot>", "not XML"),
        ("<sdf/>", "first element is <sdf>"),
        ("<robot/>", "no joint 'waist', 'finger'; correct joints.names"),
        (urdf(more='<joint name="waist" type="fixed"/>'), "'waist' twice"),
        (urdf(kind="fixed"), "'waist' is of type 'fixed'"),
        (urdf(""), "'waist' has no <limit>"),
        (urdf('<limit velocity="1"/>'), "'waist': the URDF's limits leave 0 to 0"),
        (urdf('<limit lower="1" upper="-1" velocity="1"/>'), "lower must be below upper"),
        (urdf('<limit lower="-1" upper="1" velocity="0"/>'), "velocity 0 in the URDF"),
        (urdf('<limit lower="nan" upper="1"/>'), "limit lower is 'nan'"),
        (urdf('<limit lower="-1_0" upper="1"/>'), "limit lower is '-1_0'"),
        (urdf('<limit lower="" upper="1"/>'), "limit lower is ''"),
        (urdf(LIMIT + '<safety_controller soft_upper_limit="x"/>'), "soft_upper_limit is 'x'"),
        (urdf(LIMIT + '<safety_controller soft_upper_limit="-2"/>'), "leave -1.5 to -2"),
        (urdf(more=ros2_control(interface("position", "?", "1"))), "position min is '?'"),
        (urdf(more=ros2_control(interface("velocity", "1", "2"))), "velocity from 1 to 2"),
        (" " * (16 * 2**20 + 1), "characters, the limit is"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(text: str, words: str) -> None:
    with pytest.raises(UrdfError, match=re.escape(words)):
        read_urdf_limits(text, JOINTS.names)


def test_entities_are_refused() -> None:
    """A few lines would become gigabytes, or a file of the robot's computer."""
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x"}">' for n in range(12))
    for declared in (levels, '<!ENTITY e11 SYSTEM "file:///etc/passwd">'):
        text = f"<!DOCTYPE robot [{declared}]>" + urdf("&e11;")
        with pytest.raises(UrdfError, match="document type declaration"):
            read_urdf_limits(text, JOINTS.names)
    with pytest.raises(UrdfError, match="undefined entity"):
        read_urdf_limits(urdf("&e11;"), JOINTS.names)


@given(st.text(max_size=60), st.integers(0, 400))
def test_any_text_is_limits_or_a_reason(insert: str, at: int) -> None:
    whole = urdf(more=ros2_control(interface("position", "-1", "1")))
    text = whole[:at] + insert + whole[at + len(insert) // 2 :]
    try:
        limits = read_urdf_limits(text, JOINTS.names)
    except UrdfError as error:
        assert 0 < len(str(error)) < 500
    else:
        for joint in limits.values():
            assert joint.lower < joint.upper and joint.max_velocity > 0
            assert not math.isnan(joint.max_acceleration)
