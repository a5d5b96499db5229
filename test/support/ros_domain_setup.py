"""ROS tests go through the real middleware: loopback only, a domain per test process."""

import os
from collections.abc import Iterator

from pi05_lab.demo.ros_domain import claim_domain

# also where the user works in a domain: the tests must not command a robot
os.environ["ROS_DOMAIN_ID"] = str(claim_domain())
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"

import pytest
import rclpy

from pi05_ros.nodes.main import prepare

prepare()


@pytest.fixture()
def ros() -> Iterator[None]:
    """An initialised rclpy context."""
    rclpy.init()
    yield
    rclpy.try_shutdown()
