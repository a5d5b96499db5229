"""The node's runner for evaluations: the same factory, parameters and limits, a simulated clock.

Runs a policy on a simulated clock: what it takes in real time does not matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

from pi05_ros.config import SchedulerParameters
from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.executor import ExecutorState, InferenceExecutor, InferenceResult, check_chunk
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.runner_factory import make_runner
from pi05_ros.types import ActionPrefix, ImageArray, Observation, Policy


class SimulatedExecutor:
    """What executors on a simulated clock have in common with `InferenceExecutor`.

    `busy_since_s` is by time.monotonic, which the watchdog compares it with; it is given for a
    request that has taken longer than `hang_timeout_s` by the simulated clock, and None before.
    """

    failure: str | None = None

    def __init__(self) -> None:
        self.now_s = 0.0
        """Simulated time; the owner of the clock sets it before each tick."""
        self.hang_timeout_s = math.inf
        self._begun_s = self._busy_until_s = -math.inf
        self._hung_since_s: float | None = None

    @property
    def state(self) -> ExecutorState:
        return ExecutorState.READY if self._is_due() else ExecutorState.BUSY

    @property
    def busy_since_s(self) -> float | None:
        busy_s = self.now_s - self._begun_s
        if self._is_due() or busy_s <= self.hang_timeout_s:
            return None
        if self._hung_since_s is None:
            self._hung_since_s = time.monotonic() - busy_s
        return self._hung_since_s

    def _begin(self, until_s: float) -> None:
        self._begun_s, self._busy_until_s, self._hung_since_s = self.now_s, until_s, None

    def _is_due(self) -> bool:
        return self.now_s >= self._busy_until_s - 1e-9


class TimedExecutor(SimulatedExecutor):
    """Stands in for `InferenceExecutor` in a `PolicyRunner`; the same life on another clock.

    A request is served at once, and its result is handed out when the clock has reached the
    observation's stamp plus the delay. Until then the executor is busy.

    Args:
        policy: infers in the caller's thread.
        delay_s: simulated time from an observation's stamp to its usable chunk, or what draws it
            for each one. A tick takes what is there when it begins, so even 0 means the tick after.
    """

    def __init__(self, policy: Policy, delay_s: float | Callable[[], float]) -> None:
        super().__init__()
        if not callable(delay_s):
            if not (math.isfinite(delay_s) and delay_s >= 0):
                raise ValueError(f"the delay must be a finite time from 0 s on, got {delay_s}")
            delay_s = partial(float, delay_s)
        self.completed = 0
        self.failed = 0
        self._policy = policy
        self._draw_delay_s = delay_s
        self._result: InferenceResult | None = None

    def submit(self, source: Callable[[], Observation], prefix: ActionPrefix | None = None) -> None:
        """Infer on what `source` returns; replaces a result that was not collected."""
        started_s = time.monotonic()
        observation = source()
        decoded_s = time.monotonic()
        chunk, error = None, None
        try:
            chunk = self._policy.infer(observation, prefix)
            check_chunk(chunk, self._policy, observation)
            self.completed += 1
        except Exception as exception:
            chunk, error = None, " ".join(f"{type(exception).__name__}: {exception}".split())
            self.failed += 1
        finished_s = time.monotonic()
        self._begin(observation.stamp_s + self._draw_delay_s())
        self._result = InferenceResult(
            chunk,
            error,
            observation.stamp_s,
            started_s,
            finished_s,
            decoded_s - started_s,
            finished_s - decoded_s,
        )

    def results(self) -> list[InferenceResult]:
        """The result, once, when it is due."""
        if self._result is None or not self._is_due():
            return []
        result, self._result = self._result, None
        return [result]

    def discard(self) -> None:
        """Throw the result away; the executor stays busy for as long as it would have been."""
        self._result = None


def evaluation_runner(
    robot: RobotConfig,
    scheduling: SchedulerParameters,
    cameras: Collection[str],
    executor: SimulatedExecutor,
    decode_image: Callable[[Any], ImageArray],
    prove_starts: bool = True,
) -> PolicyRunner:
    """The runner that the node would make of a params file.

    Args:
        robot: the params file.
        scheduling: its scheduler parameters, or a variant of them.
        cameras: names of those that the policy has; the file's others are left out.
        executor: stands in for the node's.
        decode_image: a stored picture → RGB [height, width, 3].
        prove_starts: see `make_runner`.

    Raises:
        RobotConfigError: the limits are a URDF's, and none was given.
    """
    robot.check_limits()
    executor.hang_timeout_s = robot.faults.hang_timeout_s
    return make_runner(
        robot.parameters,
        scheduling,
        robot.faults,
        {name: camera for name, camera in robot.cameras.items() if name in cameras},
        robot.joints,
        # the runner uses state, busy_since_s, failure, submit, results and discard of it
        cast("InferenceExecutor", executor),
        decode_image,
        prove_starts,
    )


def sent_trajectory(runner: PolicyRunner, tick: Tick, now_s: float) -> TrajectoryPoints | None:
    """What the node sends to the controllers after a tick; a fault deactivates and brakes."""
    braking = tick.braking
    if tick.fault is not None:
        braking = runner.deactivate(now_s)
    return tick.trajectory if braking is None else braking.trajectory
