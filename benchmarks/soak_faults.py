"""The soak's faults: how each begins, how long it lasts, how it ends and when it is over."""

from __future__ import annotations

import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from soak_processes import Processes
from soak_watcher import INSTRUCTION, Watcher

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
RECOVERY_LIMIT_S = 30.0


def permuted(message: Any) -> Any:
    message.name, message.position = message.name[::-1], message.position[::-1]
    message.velocity = message.velocity[::-1]
    return message


def doubled(message: Any) -> Any:
    message.name = [*message.name[:-1], message.name[0]]
    return message


class Faults:
    """Fires faults and measures how long each takes to be over."""

    def __init__(self, processes: Processes, watcher: Watcher, rng: random.Random) -> None:
        self._watcher, self._rng = watcher, rng
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.lost: list[str] = []
        policy = ("nan 2", "nan", "raise", "shape", "sleep 0.5", "hang 4", "oom", "wild")
        # name → how it begins, how it ends, seconds between
        self.faults: dict[str, tuple[Callable[[], None], Callable[[], None], float]] = {
            "a camera stops": (self._stop_camera, self._all_cameras, 2.0),
            "joints permuted": (lambda: self._spoil(permuted), self._pass_on, 2.0),
            "a joint twice": (lambda: self._spoil(doubled), self._pass_on, 2.0),
            "~/stop": (lambda: watcher.trigger("policy/stop"),
                       lambda: watcher.trigger("policy/resume"), 2.0),
            "200 instructions": (self._flood, self._instruct, 0.5),
            "simulator killed": (lambda: processes.kill("sim"),
                                 lambda: processes.start("sim"), 2.0),
            "node stalled": (lambda: processes.signal("node", signal.SIGSTOP),
                             lambda: processes.signal("node", signal.SIGCONT), 1.5),
            **{f"policy: {fault}": (self._order(fault), self._instruct, 3.0) for fault in policy},
        }  # fmt: skip

    def fire(self, name: str) -> None:
        """One fault, until it is recovered from."""
        begin, end, lasts_s = self.faults[name]
        begin()
        time.sleep(lasts_s)
        end()
        ended_s = time.monotonic()
        if self.wait_for_motion(ended_s):
            self.recovery_s[name].append(time.monotonic() - ended_s)
        else:
            self.lost.append(name)

    def wait_for_motion(self, since_s: float) -> bool:
        """Help as an operator would: configure and activate what has given up."""
        from pi05_ros.msg import PolicyStatus

        while time.monotonic() - since_s < RECOVERY_LIMIT_S:
            if self._watcher.recovered(since_s):
                return True
            if self._watcher.state in (PolicyStatus.ERROR, PolicyStatus.UNCONFIGURED):
                self._watcher.transition("configure")
                self._instruct()
            if self._watcher.state in (
                PolicyStatus.ERROR, PolicyStatus.UNCONFIGURED, PolicyStatus.INACTIVE
            ):  # fmt: skip
                self._watcher.transition("activate")
            time.sleep(0.1)
        return False

    def _stop_camera(self) -> None:
        gone = self._rng.choice(CAMERAS)
        self._watcher.set_cameras([name for name in CAMERAS if name != gone])

    def _all_cameras(self) -> None:
        self._watcher.set_cameras(CAMERAS)

    def _spoil(self, how: Callable[[Any], Any]) -> None:
        self._watcher.spoil = how

    def _pass_on(self) -> None:
        self._watcher.spoil = lambda message: message

    def _order(self, fault: str) -> Callable[[], None]:
        return lambda: self._watcher.instruct(f"fault {fault}")

    def _instruct(self) -> None:
        self._watcher.instruct(INSTRUCTION)

    def _flood(self) -> None:
        for i in range(200):
            self._watcher.instruct("x" * self._rng.randint(0, 400) if i % 2 else f"do this {i}")
