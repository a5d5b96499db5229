"""Two controllers that hold their last command for ever: one by velocity, one by position."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import CONTROL_PERIOD_S, CONTROLLERS, ROOT, NodeProcess, Peer, limits
from std_msgs.msg import Float64MultiArray

VELOCITY, POSITION = CONTROLLERS
WAIST = {VELOCITY: 0, POSITION: 7}
MAX_VELOCITY, MAX_ACCELERATION = limits().max_velocity[0], limits().max_acceleration[0]


class Arms:
    """The two controllers: they keep their waist's commands and move the peer's joints."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.commands: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTROLLERS}
        """Controller → arrival time and the waist's command."""
        self._moving_s: float | None = None
        self._velocities: np.ndarray = np.zeros(7)
        self._subscriptions: dict[str, Any] = {}
        for name in CONTROLLERS:
            self.subscribe(name)

    def subscribe(self, name: str) -> None:
        self._subscriptions[name] = self.peer.node.create_subscription(
            Float64MultiArray, f"{name}/commands", functools.partial(self._on_command, name), 100
        )

    def unsubscribe(self, name: str) -> None:
        """The controller is gone; its arm stands still."""
        self.peer.destroy(self.peer.node.destroy_subscription, self._subscriptions.pop(name))
        if name == VELOCITY:
            self._moving_s = None

    def destroy(self) -> None:
        for name in list(self._subscriptions):
            self.unsubscribe(name)

    def _on_command(self, name: str, message: Float64MultiArray) -> None:
        now_s = time.monotonic()
        positions = self.peer.positions.copy()
        values = np.array(message.data)
        if name == POSITION:
            positions[7:] = values
        else:
            if self._moving_s is not None:
                positions[:7] += self._velocities * (now_s - self._moving_s)
            self._moving_s, self._velocities = now_s, values
        self.peer.positions = positions
        self.commands[name].append((now_s, float(values[0])))

    def last(self, name: str) -> float:
        return self.commands[name][-1][1] if self.commands[name] else 0.0

    def speed(self, name: str) -> float:
        """rad/s that was commanded last."""
        commands = self.commands[name]
        if name == VELOCITY:
            return abs(self.last(name))
        return abs(commands[-1][1] - commands[-2][1]) / CONTROL_PERIOD_S if commands[1:] else 0.0

    def fast(self) -> bool:
        return all(self.speed(name) > 0.8 for name in CONTROLLERS)

    def rest(self, *names: str) -> bool:
        """Whether the last commands are rest, and nothing else has come for a while."""
        return all(
            self.speed(name) < 1e-3 and (name == VELOCITY or self.silent(name)) for name in names
        )

    def silent(self, name: str, seconds: float = 0.2) -> bool:
        return time.monotonic() - self.commands[name][-1][0] > seconds

    def velocities(self, name: str, since_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Times of arrival and commanded velocities from `since_s` on."""
        times_s, values = np.array([each for each in self.commands[name] if each[0] >= since_s]).T
        if name == VELOCITY:
            return times_s, values
        return times_s[1:], np.diff(values) / CONTROL_PERIOD_S

    def check_steps(self, since_s: float, *names: str) -> None:
        """No step of velocity or position beyond its limit, by the time between the commands.

        Commands wait in a busy machine: a step may be late by some periods, never early.
        """
        for name in names or CONTROLLERS:
            times_s, values = np.array(
                [each for each in self.commands[name] if each[0] >= since_s]
            ).T
            limit = MAX_ACCELERATION if name == VELOCITY else MAX_VELOCITY
            allowed = limit * (np.diff(times_s) + 3 * CONTROL_PERIOD_S)
            steps = np.abs(np.diff(values))
            worst = int(np.argmax(steps - allowed))
            assert steps[worst] <= allowed[worst], (name, steps[worst], allowed[worst])


def launch(log: Path, *arguments: str) -> NodeProcess:
    return NodeProcess(
        ROOT / "test" / "soak" / "faulty_policy_node.py",
        log,
        *("-p", "checkpoint:=wave", "-p", "status_rate_hz:=10.0"),
        *("-p", f"controllers.{VELOCITY}.output:=forward_velocity"),
        *("-p", f"controllers.{POSITION}.output:=forward_position"),
        *arguments,
    )
