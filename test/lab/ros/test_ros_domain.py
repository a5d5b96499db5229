"""The demo and the tests stay out of every domain that a robot or another process uses.

Pins: a domain computed from the process id (1 to 100), which may be a robot's; ROS_DOMAIN_ID of a
robot's shell that the demo took over.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import rclpy

from pi05_lab.demo.ros_domain import DOMAINS, NoFreeDomain, claim_domain, is_free, use_own_domain

CLAIM = (
    "from pi05_lab.demo.ros_domain import claim_domain; print(claim_domain(), flush=True); input()"
)


def test_a_domain_with_a_participant_is_not_free(ros: None) -> None:
    """`ros` uses this test process's domain, claimed by conftest.py."""
    own = int(os.environ["ROS_DOMAIN_ID"])
    assert own in DOMAINS
    node = rclpy.create_node("occupant")
    try:
        assert not is_free(own)
    finally:
        node.destroy_node()


def test_the_port_of_a_later_participant_counts_too() -> None:
    domain = next(filter(is_free, DOMAINS))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * domain + 10 + 2 * 3))
        assert not is_free(domain)
    assert is_free(domain)


def test_two_processes_that_look_at_once_get_two_domains() -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    domains = []
    for child in children:
        assert child.stdout is not None
        domains.append(int(child.stdout.readline()))
    for child in children:
        child.communicate("\n")
    assert len({*domains, int(os.environ["ROS_DOMAIN_ID"])}) == 4
    assert all(domain in DOMAINS for domain in domains)


def test_no_free_domain_is_said() -> None:
    own = int(os.environ["ROS_DOMAIN_ID"])
    with pytest.raises(NoFreeDomain, match="no ROS domain"):
        claim_domain([own])


def test_a_robots_domain_in_the_environment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "7")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    assert use_own_domain() in DOMAINS
    assert int(os.environ["ROS_DOMAIN_ID"]) in DOMAINS
    assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
