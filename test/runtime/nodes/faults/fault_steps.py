"""Steps and checks that the tests of faults share."""

from __future__ import annotations

import time

import numpy as np
from harness import CONTROL_PERIOD_S, CONTROLLERS, HOME, Peer, arrays, limits

LEFT = CONTROLLERS[0]
HANG_TIMEOUT_S = 0.4
ELSEWHERE = HOME + np.where(limits().gripper, 0.015, 0.1)
"""[14] farther from HOME than a joint moves in a control period."""


def moved(peer: Peer) -> bool:
    return all(peer.trajectories[name] for name in CONTROLLERS)


def start(peer: Peer, instruction: str = "sweep") -> None:
    assert peer.change_state("configure")
    peer.run_robot()
    peer.instruct(instruction)
    assert peer.change_state("activate")


def start_moving(peer: Peer) -> None:
    start(peer)
    peer.wait(lambda: moved(peer), "trajectory")


def quiet(peer: Peer, seconds: float = 0.3) -> bool:
    """Whether nothing is published; what is under way when it is called does not count."""
    time.sleep(0.15)
    peer.reset()
    time.sleep(seconds)
    return not peer.chunks and not any(peer.trajectories[name] for name in CONTROLLERS)


def shows(peer: Peer, text: str) -> bool:
    return bool(peer.statuses) and any(text in problem for problem in peer.statuses[-1].problems)


def level(peer: Peer, part: str) -> bytes | None:
    status = peer.diagnostics.get(f"policy: {part}")
    return status.level if status else None


def value(peer: Peer, part: str, key: str) -> float:
    """A figure of /diagnostics; 0 before the first."""
    status = peer.diagnostics.get(f"policy: {part}")
    figures = {pair.key: pair.value for pair in status.values} if status else {}
    return float(figures.get(key, 0.0))


def starts_at(peer: Peer, positions: np.ndarray) -> None:
    """The next motion begins where the robot is measured to be.

    That may be the last commanded rest, if every joint is within max_velocity · dt of it.
    """
    first = peer.wait(lambda: moved(peer) and peer.trajectories[LEFT][0], "trajectory")
    near = limits().max_velocity[:7] * CONTROL_PERIOD_S
    begin = arrays(first)[1][0]
    assert (np.abs(begin - positions[:7]) <= near + 1e-3).all(), (begin, positions, peer.positions)
