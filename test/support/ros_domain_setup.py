"""ROS tests go through the real middleware: loopback only, a domain per test process."""

import os
from collections.abc import Iterator

from pi05_ros.nodes.ros_domain import claim_domain

# also where the user works in a domain: the tests must not command a robot
os.environ["ROS_DOMAIN_ID"] = str(claim_domain())
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"

import pytest
import rclpy

from pi05_ros.nodes.main import prepare

prepare()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Node processes write the small checkpoint there, not into the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture()
def ros() -> Iterator[None]:
    """An initialised rclpy context."""
    rclpy.init()
    yield
    rclpy.try_shutdown()
