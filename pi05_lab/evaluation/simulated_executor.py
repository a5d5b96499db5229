"""The node's runner on a simulated clock: same parameters and limits, simulated inference time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, cast

from pi05_ros.config import SchedulerParameters
from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.executor import (
    ExecutorState,
    InferenceExecutor,
    InferenceResult,
    check_chunk,
    one_line,
)
from pi05_ros.observation.buffer import History
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.runner_factory import make_runner
from pi05_ros.types import ActionChunk, ActionPrefix, ImageArray, Observation, Policy

Infer = Callable[[Observation, ActionPrefix | None], ActionChunk]
ROUNDING_S = 1e-9


class SimulatedExecutor:
    """Replaces `InferenceExecutor` in a `PolicyRunner`: each inference takes a simulated time.

    A request runs at once, in the caller's thread. Its result is available when the clock reaches
    the observation's stamp plus the delay; until then the executor is busy. Results have wall-clock
    times of 0.

    Args:
        infer: the policy.
        delay_s: from an observation's stamp to its usable chunk, or a function that draws it for
            each inference. The runner takes results at the beginning of a tick, so a chunk is used
            one tick after its request at the earliest.

    Raises:
        ValueError: the delay is negative or not finite.
    """

    failure: str | None = None

    def __init__(self, infer: Infer, delay_s: float | Callable[[], float]) -> None:
        if not callable(delay_s) and not (math.isfinite(delay_s) and delay_s >= 0):
            raise ValueError(f"the delay must be finite and at least 0 s, got {delay_s}")
        self.now_s = 0.0
        """Simulated time; the owner of the clock sets it before each tick."""
        self.accepts_requests = True
        """If False, the executor counts as busy."""
        self.hang_timeout_s = math.inf
        self.completed = 0
        self.failed = 0
        self._infer = infer
        self._delay_s = delay_s
        self._result: InferenceResult | None = None
        self._started_s = self._due_s = -math.inf
        self._hung_since_s: float | None = None

    @property
    def state(self) -> ExecutorState:
        ready = self.accepts_requests and self._is_due()
        return ExecutorState.READY if ready else ExecutorState.BUSY

    @property
    def busy_since_s(self) -> float | None:
        """Start of a request that takes longer than `hang_timeout_s` of simulated time, else None.

        By time.monotonic, with which the watchdog compares it.
        """
        busy_s = self.now_s - self._started_s
        if self._is_due() or busy_s <= self.hang_timeout_s:
            return None
        if self._hung_since_s is None:
            self._hung_since_s = time.monotonic() - busy_s
        return self._hung_since_s

    def submit(self, source: Callable[[], Observation], prefix: ActionPrefix | None = None) -> None:
        """Infer on what `source` returns; replaces a result that was not collected."""
        chunk = error = stamp_s = None
        try:
            observation = source()
            stamp_s = observation.stamp_s
            chunk = self._infer(observation, prefix)
            self.completed += 1
        except Exception as exception:  # as `InferenceExecutor` does
            error = one_line(exception)
            self.failed += 1
        delay_s = self._delay_s() if callable(self._delay_s) else self._delay_s
        self._due_s = (self.now_s if stamp_s is None else stamp_s) + delay_s
        self._started_s, self._hung_since_s = self.now_s, None
        self._result = InferenceResult(chunk, error, stamp_s, 0.0, 0.0, 0.0, 0.0)

    def results(self) -> list[InferenceResult]:
        """The result, once, when it is due."""
        if self._result is None or not self._is_due():
            return []
        result, self._result = self._result, None
        return [result]

    def discard(self) -> None:
        """Drop the result; the executor stays busy until it would have been due."""
        self._result = None

    def _is_due(self) -> bool:
        return self.now_s >= self._due_s - ROUNDING_S


def checked_infer(policy: Policy) -> Infer:
    """The policy's `infer` with the executor's check of every chunk."""

    def infer(observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        chunk = policy.infer(observation, prefix)
        check_chunk(chunk, policy, observation)
        return chunk

    return infer


def evaluation_runner(
    robot: RobotConfig,
    scheduling: SchedulerParameters,
    cameras: Collection[str],
    executor: SimulatedExecutor,
    decode_image: Callable[[Any], ImageArray],
    prove_starts: bool = True,
    history: History | None = None,
) -> PolicyRunner:
    """The runner that the node makes from a params file, with another executor.

    Args:
        robot: the params file.
        scheduling: the file's, or a variant of them.
        cameras: the policy's; others of the file are left out.
        executor: replaces the node's.
        decode_image: a stored image → RGB [height, width, 3].
        prove_starts, history: see `make_runner`.

    Raises:
        RobotConfigError: the limits are a URDF's, and none was given.
    """
    robot.check_limits()
    executor.hang_timeout_s = robot.faults.hang_timeout_s
    own = {name: camera for name, camera in robot.cameras.items() if name in cameras}
    robot = replace(robot, scheduler=scheduling, cameras=own)
    # the runner uses state, busy_since_s, failure, submit, results and discard of the executor
    stand_in = cast("InferenceExecutor", executor)
    return make_runner(robot, stand_in, decode_image, prove_starts, history)


def sent_trajectory(runner: PolicyRunner, tick: Tick, now_s: float) -> TrajectoryPoints | None:
    """What the node publishes after a tick; a fault deactivates and brakes."""
    braking = tick.braking if tick.fault is None else runner.deactivate(now_s)
    return tick.trajectory if braking is None else braking.trajectory
