"""The soak's faults: beginning, duration, end and recovery of each."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soak_processes import Processes
from soak_watcher import INSTRUCTION, Watcher

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
RECOVERY_LIMIT_S = 30.0
AUTOSTART_S = 15.0
"""A new process configures and activates itself; the soak does not interfere before."""
POLICY_FAULTS = ("nan 2", "nan", "raise", "shape", "sleep 0.5", "hang 4", "oom", "wild")
SCHEDULING: dict[str, tuple[object, ...]] = {
    "method": ("temporal_ensemble", "latest", "blend"),
    "ensemble_m": (-0.1, 0.0, 0.1),
    "ensemble_max_chunks": (1, 4, 16),
    "guard_disagreement": (0.0, 0.2, 1.0),
    "replan": ("free", "steps", "remaining"),
    "speed_scale": (0, 0.3, 1.0),
}
"""Values that `scheduler.*` changes to in motion; the last step restores the parameters file's."""
GLITCH_SHARE = 0.05
GLITCH_RAD = 0.6
NO_RESUME = "stopped: ~/resume"


@dataclass(frozen=True)
class Fault:
    """Beginning and end of a fault."""

    begin: Callable[[], None]
    end: Callable[[], None]
    lasts_s: float
    restarts: bool = False
    """The policy node is a new process afterwards."""
    problem: str = ""
    """The beginning of a line that the status must contain meanwhile."""


def permuted(message: Any) -> Any:
    message.name, message.position = message.name[::-1], message.position[::-1]
    message.velocity = message.velocity[::-1]
    return message


def duplicated(message: Any) -> Any:
    message.name = [*message.name[:-1], message.name[0]]
    return message


def nothing() -> None:
    pass


class Faults:
    """Fires faults and measures the recovery time of each."""

    def __init__(self, processes: Processes, watcher: Watcher, rng: random.Random) -> None:
        self._processes, self._watcher, self._rng = processes, watcher, rng
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.resumed: Counter[str] = Counter()
        """Fault → how often `~/resume` was needed after it."""
        self.lost: list[str] = []
        self.unreported: list[str] = []
        """Faults whose problem the status did not name, and refused parameters."""
        self.exit_codes: list[int] = []
        """Other than 0, after SIGTERM."""
        self._name = ""
        self._controller = watcher.controllers[0]
        second = "publishers: 2 on"
        self.faults = {
            "a camera stops": Fault(self._stop_camera, self._all_cameras, 2.0),
            "joints permuted": Fault(lambda: self._alter(permuted), self._pass_on, 2.0),
            "a duplicate joint": Fault(lambda: self._alter(duplicated), self._pass_on, 2.0),
            "encoder glitches": Fault(lambda: self._alter(self._glitch), self._pass_on, 2.0),
            "~/stop": Fault(
                lambda: watcher.trigger("policy/stop"),
                lambda: watcher.trigger("policy/resume"),
                2.0,
                problem=NO_RESUME,
            ),
            "200 instructions": Fault(self._flood, self._instruct, 0.5),
            "scheduler.* changes": Fault(self._reschedule, self._restore_scheduler, 0.0),
            "a controller absent for 30-60 ms": Fault(self._flap, nothing, 0.0),
            "a controller absent for 1 s": Fault(
                self._unsubscribe, self._subscribe, 1.0,
                problem="controllers: no controller subscribes",
            ),
            "second publisher on a controller": Fault(
                lambda: watcher.add_publisher(f"{self._pick()}/joint_trajectory"),
                watcher.remove_publisher, 1.0, problem=second,
            ),
            "second publisher on joint_states": Fault(
                lambda: watcher.add_publisher("joint_states"),
                watcher.remove_publisher, 1.0, problem=second,
            ),
            # The middleware reports a killed process until its lease ends.
            "second driver, then killed": Fault(
                self._start_driver, lambda: processes.kill("driver"), 1.0, problem=second
            ),
            "emergency stop": Fault(self._drives_off, self._drives_on, 3.0, problem="stopped: "),
            "simulator killed": Fault(
                lambda: processes.kill("sim"), lambda: processes.start("sim"), 2.0
            ),
            "node stalled": Fault(
                lambda: processes.signal("node", signal.SIGSTOP),
                lambda: processes.signal("node", signal.SIGCONT), 1.5,
            ),
            "node killed (SIGKILL)": Fault(
                lambda: processes.kill("node"), self._start_node, 1.0, restarts=True
            ),
            "node ended (SIGTERM)": Fault(self._terminate, self._start_node, 0.0, restarts=True),
            **{
                f"policy: {fault}": Fault(self._order(fault), self._instruct, 3.0)
                for fault in POLICY_FAULTS
            },
        }  # fmt: skip

    def fire(self, name: str) -> None:
        """One fault, until it is recovered from."""
        fault, watcher = self.faults[name], self._watcher
        self._name = name
        watcher.seen.clear()
        fault.begin()
        time.sleep(fault.lasts_s)
        if fault.problem and not any(seen.startswith(fault.problem) for seen in set(watcher.seen)):
            self.unreported.append(f"{name}: the status does not contain {fault.problem!r}")
        fault.end()
        ended_s = time.monotonic()
        if self.wait_for_motion(ended_s, AUTOSTART_S if fault.restarts else 0.0):
            self.recovery_s[name].append(time.monotonic() - ended_s)
        else:
            self.lost.append(f"{name} ({'; '.join(watcher.problems) or 'no problem named'})")

    def wait_for_motion(self, since_s: float, assist_after_s: float = AUTOSTART_S) -> bool:
        """Wait for commands; configure, activate and resume as an operator does."""
        from pi05_ros.msg import PolicyStatus

        watcher = self._watcher
        resumed = False
        while time.monotonic() - since_s < RECOVERY_LIMIT_S:
            if watcher.recovered(since_s):
                return True
            if time.monotonic() - since_s < assist_after_s:
                time.sleep(0.1)
                continue
            if watcher.state in (PolicyStatus.ERROR, PolicyStatus.UNCONFIGURED):
                watcher.transition("configure")
                self._instruct()
            if watcher.state in (
                PolicyStatus.ERROR, PolicyStatus.UNCONFIGURED, PolicyStatus.INACTIVE
            ):  # fmt: skip
                watcher.transition("activate")
            if any(problem.startswith("stopped: ") for problem in watcher.problems):
                self.resumed[self._name] += not resumed
                resumed = True
                watcher.trigger("policy/resume")
            time.sleep(0.1)
        return False

    def _pick(self) -> str:
        self._controller = self._rng.choice(self._watcher.controllers)
        return self._controller

    def _stop_camera(self) -> None:
        stopped = self._rng.choice(CAMERAS)
        self._watcher.set_cameras([name for name in CAMERAS if name != stopped])

    def _all_cameras(self) -> None:
        self._watcher.set_cameras(CAMERAS)

    def _alter(self, how: Callable[[Any], Any]) -> None:
        self._watcher.alter = how

    def _pass_on(self) -> None:
        self._watcher.alter = lambda message: message

    def _glitch(self, message: Any) -> Any:
        """One joint's reading wrong, in one of twenty joint states."""
        if self._rng.random() < GLITCH_SHARE:
            joint = self._rng.randrange(len(message.position))
            message.position[joint] += self._rng.choice((-GLITCH_RAD, GLITCH_RAD, 1e9))
        return message

    def _order(self, fault: str) -> Callable[[], None]:
        return lambda: self._watcher.instruct(f"fault {fault}")

    def _instruct(self) -> None:
        self._watcher.instruct(INSTRUCTION)

    def _flood(self) -> None:
        for i in range(200):
            self._watcher.instruct("x" * self._rng.randint(0, 400) if i % 2 else f"do this {i}")

    def _reschedule(self) -> None:
        for _ in range(8):
            name = self._rng.choice(list(SCHEDULING))
            self._set(name, self._rng.choice(SCHEDULING[name]))
            time.sleep(self._rng.uniform(0.1, 0.4))

    def _restore_scheduler(self) -> None:
        for name in SCHEDULING:
            self._set(name, getattr(self._watcher.scheduling, name))

    def _set(self, name: str, value: object) -> None:
        refused = self._watcher.set_parameter("policy", f"scheduler.{name}", value)
        if refused:
            self.unreported.append(f"scheduler.{name} {value!r} refused: {refused}")

    def _flap(self) -> None:
        for _ in range(3):
            name = self._pick()
            self._watcher.unsubscribe(name)
            time.sleep(self._rng.uniform(0.03, 0.06))
            self._watcher.subscribe(name)
            time.sleep(self._rng.uniform(0.0, 0.5))

    def _unsubscribe(self) -> None:
        self._watcher.unsubscribe(self._pick())

    def _subscribe(self) -> None:
        self._watcher.subscribe(self._controller)

    def _drives_off(self) -> None:
        """The arms stop following while the policy commands motion."""
        self._watcher.follows = False
        self._watcher.instruct("fault far")

    def _drives_on(self) -> None:
        self._watcher.follows = True
        self._instruct()

    def _start_driver(self) -> None:
        self._processes.start("driver")
        since_s = time.monotonic()
        while (
            self._watcher.node.count_publishers("joint_states") < 2
            and time.monotonic() - since_s < RECOVERY_LIMIT_S
        ):
            time.sleep(0.05)

    def _terminate(self) -> None:
        self._processes.signal("node", signal.SIGTERM)
        code = self._processes.wait("node")
        if code != 0:
            self.exit_codes.append(code)

    def _start_node(self) -> None:
        from pi05_ros.msg import PolicyStatus

        self._watcher.reset()
        self._watcher.problems, self._watcher.state = (), PolicyStatus.UNCONFIGURED
        self._processes.start("node")
