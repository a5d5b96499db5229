"""Parameters of where the joints' limits come from."""

from __future__ import annotations

from dataclasses import dataclass

from pi05_ros.nodes.declare import parameter

SOURCES = ("params", "urdf")


@dataclass(frozen=True)
class LimitsParameters:
    """Parameters `limits.*`, read when the node is configured."""

    source: str = parameter(
        "params",
        "params: joints.*.lower, upper, max_velocity, max_acceleration; urdf: what these and the "
        "URDF both allow",
        choices=SOURCES,
    )
    topic: str = parameter("robot_description", "urdf: a latched String, robot_state_publisher's")
    timeout_s: float = parameter(
        5.0, "urdf: how long configure waits for it", lower=0.1, upper=600.0
    )
