"""A process that was killed leaves the ROS graph."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import rclpy
from harness import ROOT

pytestmark = pytest.mark.slow

DRIVER = ROOT / "test" / "soak" / "soak_driver.py"
DEFAULT_LEASE_S = 20.0


def test_a_killed_driver_leaves_the_graph_before_the_middlewares_default(ros: None) -> None:
    """Pins: a driver that crashed and was started again blocks the arms for 20 s, since the dead
    one counts as a second publisher of joint_states."""
    node = rclpy.create_node("observer")
    process = subprocess.Popen([sys.executable, str(DRIVER)])
    try:
        _wait(lambda: node.count_publishers("joint_states") == 1, 30.0)
        process.kill()
        process.wait()
        _wait(lambda: node.count_publishers("joint_states") == 0, DEFAULT_LEASE_S - 5.0)
    finally:
        process.kill()
        process.wait()
        node.destroy_node()


def _wait(done: Callable[[], bool], timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s"
        time.sleep(0.05)
