"""Limits from a URDF on robot_description, through the real middleware.

Faults pinned: a URDF that is ignored or not waited for, a configure that waits for ever, one that
succeeds without the requested limits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from harness import (
    CONTROLLERS,
    ROOT,
    NodeProcess,
    Peer,
    arrays,
    check_boundaries,
    check_limits,
    limits,
)
from std_msgs.msg import String

from pi05_ros.nodes.messages import LATCHED_QOS

pytestmark = pytest.mark.slow

WAIST_RAD, WAIST_RAD_S = 0.1, 0.2
"""Of the left waist; the policy sweeps both by 0.2 rad with 0.31 rad/s."""


def urdf(*left_out: str) -> str:
    joints = limits().joints
    texts = []
    for joint in joints:
        if joint.name in left_out:
            continue
        lower, upper, velocity, soft = joint.lower - 1.0, joint.upper + 1.0, 9.0, ""
        if joint.name == "left_waist":
            soft = f'<safety_controller soft_lower_limit="-{WAIST_RAD}" soft_upper_limit="1"/>'
            upper, velocity = WAIST_RAD, WAIST_RAD_S
        texts.append(
            f'<joint name="{joint.name}" type="{"prismatic" if joint.gripper else "revolute"}">'
            f'<limit lower="{lower}" upper="{upper}" velocity="{velocity}" effort="1"/>{soft}'
            "</joint>"
        )
    return f'<robot name="aloha">{"".join(texts)}</robot>'


def waists(peer: Peer, controller: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities of an arm's first joint in all its trajectories."""
    moves = [arrays(trajectory) for trajectory in list(peer.trajectories[controller])]
    positions = [positions[:, 0] for _, positions, _ in moves]
    velocities = [velocities[:, 0] for _, _, velocities in moves]
    return np.concatenate([np.zeros(1), *positions]), np.concatenate([np.zeros(1), *velocities])


@pytest.fixture()
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture()
def process(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[NodeProcess]:
    process = NodeProcess(
        ROOT / "test" / "soak" / "faulty_policy_node.py",
        tmp_path_factory.mktemp("urdf") / "policy_node.log",
        *("-p", "checkpoint:=wave", "-p", "status_rate_hz:=10.0"),
        *("-p", "limits.source:=urdf", "-p", "limits.timeout_s:=1.0"),
    )
    peer.wait(lambda: peer.statuses, "status", 60.0)
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log


def test_a_urdf_narrows_what_is_commanded(peer: Peer, process: NodeProcess) -> None:
    """Promise 5. One node: no URDF, one that lacks a joint, one that is narrower."""
    began_s = time.monotonic()
    assert not peer.change_state("configure")
    assert time.monotonic() - began_s < 10.0
    assert "no URDF came on /robot_description within 1 s" in process.log

    publisher = peer.node.create_publisher(String, "robot_description", LATCHED_QOS)
    publisher.publish(String(data=urdf("right_elbow")))
    assert not peer.change_state("configure")
    assert "the URDF has no joint 'right_elbow'" in process.log
    publisher.publish(String(data="<robot"))
    assert not peer.change_state("configure")
    assert "/robot_description: the URDF is not XML" in process.log

    publisher.publish(String(data=urdf()))
    assert peer.change_state("configure"), process.log
    assert "limits: /robot_description narrows left_waist" in process.log
    peer.run_robot()
    peer.instruct("sweep")
    assert peer.change_state("activate")
    for name, far in zip(CONTROLLERS, (0.9 * WAIST_RAD, 1.5 * WAIST_RAD), strict=True):
        peer.wait(lambda: np.abs(waists(peer, name)[0]).max() > far, f"sweep of {name}")  # noqa: B023
    for name in CONTROLLERS:
        check_limits(peer.trajectories[name])
        check_boundaries(peer.trajectories[name])
    positions, velocities = waists(peer, CONTROLLERS[0])
    assert np.abs(positions).max() <= WAIST_RAD
    assert 0.9 * WAIST_RAD_S < np.abs(velocities).max() <= WAIST_RAD_S + 1e-9
    assert np.abs(waists(peer, CONTROLLERS[1])[1]).max() > 1.2 * WAIST_RAD_S
    part = peer.diagnostics["policy: limits"]
    assert {"source": "urdf"}.items() <= {pair.key: pair.value for pair in part.values}.items()
    assert peer.change_state("deactivate")
