"""The one thread that owns the device: it loads the policy, warms it up and runs it.

CUDA graphs and compiled code keep state per thread, so nothing of the policy runs anywhere else.
Whoever submits never waits: a request that has not begun gives way to a newer one, and results
are collected when it suits the caller.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pi05_ros.executor.results import (
    ExecutorError,
    ExecutorState,
    ExecutorStatistics,
    InferenceResult,
    check_chunk,
    is_device_fault,
    one_line,
)
from pi05_ros.types import ActionChunk, ActionPrefix, Observation, Policy

MAX_RESULTS = 16
LATENCY_HISTORY = 1000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    source: Callable[[], Observation]
    prefix: ActionPrefix | None
    generation: int


def black_observation(policy: Policy) -> Observation:
    """What a policy is warmed up with: black 480 × 640 pictures of all cameras, a zero state."""
    return Observation(
        images={name: np.zeros((480, 640, 3), dtype=np.uint8) for name in policy.cameras},
        state=np.zeros(policy.state_dim),
        instruction="warm up",
        stamp_s=0.0,
    )


class InferenceExecutor:
    """Runs a policy on a thread of its own, newest observation first.

    All methods may be called from any thread and return at once, but for `wait_ready` and `stop`,
    which take a time limit. One object is started once.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        *,
        warmup_runs: int = 2,
        warmup_observation: Callable[[Policy], Observation] = black_observation,
        on_thread_start: Callable[[], None] | None = None,
        on_result: Callable[[], None] | None = None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            load: Makes the policy.
            warmup_runs: Inferences before the policy counts as ready; they pay for compilation
                and must give valid chunks.
            warmup_observation: What these infer on.
            on_thread_start: Called first, to set up the thread or the device.
            on_result: Called after a result was queued. It must be short and must not raise.

        `load`, `warmup_observation`, `on_thread_start` and `on_result` run on the thread.
        """
        self._load = load
        self._warmup_runs = warmup_runs
        self._warmup_observation = warmup_observation
        self._on_thread_start = on_thread_start
        self._on_result = on_result
        self._changed = threading.Condition()
        # A daemon: a policy that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="pi05_executor", daemon=True)
        self._state = ExecutorState.STOPPED
        self._started = False
        self._stopping = False
        self._policy: Policy | None = None
        self._failure: BaseException | None = None
        self._pending: _Request | None = None
        self._generation = 0
        self._busy_since_s: float | None = None
        self._results: deque[InferenceResult] = deque()
        self._latencies_s: deque[float] = deque(maxlen=LATENCY_HISTORY)
        self._completed = self._failed = self._replaced = self._discarded = 0

    @property
    def state(self) -> ExecutorState:
        with self._changed:
            return self._state

    @property
    def failure(self) -> str | None:
        """Why the thread ended by itself, in one line."""
        with self._changed:
            return None if self._failure is None else one_line(self._failure)

    @property
    def busy_since_s(self) -> float | None:
        """When the request in work was begun, by time.monotonic; None if there is none."""
        with self._changed:
            return self._busy_since_s

    @property
    def statistics(self) -> ExecutorStatistics:
        with self._changed:
            return ExecutorStatistics(
                self._completed,
                self._failed,
                self._replaced,
                self._discarded,
                tuple(self._latencies_s),
            )

    def start(self) -> None:
        """Start the thread, which loads and warms up.

        Raises:
            ExecutorError: If it was started or stopped before.
        """
        with self._changed:
            if self._started or self._stopping:
                raise ExecutorError("an executor starts once, make another one")
            self._started = True
            self._state = ExecutorState.STARTING
            self._thread.start()

    def wait_ready(self, timeout_s: float) -> Policy:
        """The policy, once it is warm. It may be asked for its properties, not run.

        Raises:
            ExecutorError: If loading or warming up raised (the original is the cause), it takes
                longer than `timeout_s`, or the executor is not running.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state is not ExecutorState.STARTING, timeout_s)
            if self._state is ExecutorState.STARTING:
                raise ExecutorError(f"the policy is not ready after {timeout_s:g} s")
            self._check_running()
            assert self._policy is not None
            return self._policy

    def submit(self, source: Callable[[], Observation], prefix: ActionPrefix | None = None) -> None:
        """Ask for an inference on what `source` returns; it is called on the thread.

        The chunk is to continue `prefix`, in the policy's units, if it is given. A request that has
        not begun is replaced. Before the policy is ready, requests wait.

        Raises:
            ExecutorError: If the executor has failed, is stopping or was not started.
        """
        with self._changed:
            self._check_running()
            if self._pending is not None:
                self._replaced += 1
            self._pending = _Request(source, prefix, self._generation)
            self._changed.notify_all()

    @property
    def has_results(self) -> bool:
        """Whether `results` would have one."""
        with self._changed:
            return bool(self._results)

    def results(self) -> list[InferenceResult]:
        """Results that were not collected yet, in the order of their requests.

        At most 16 are kept; older ones give way and count as discarded.
        """
        with self._changed:
            results = list(self._results)
            self._results.clear()
            return results

    def discard(self) -> None:
        """Throw away all that was requested so far: pending, in work or not yet collected."""
        with self._changed:
            self._discard()

    def stop(self, timeout_s: float) -> bool:
        """Throw away all requests and end the thread.

        Returns:
            False if the thread is still inside the policy after `timeout_s`. It ends when the
            policy returns, without a result; a process that exits does not wait for it.
        """
        with self._changed:
            self._stopping = True
            self._discard()
            self._changed.notify_all()
            if not self._started:
                return True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _discard(self) -> None:
        self._generation += 1
        self._discarded += len(self._results) + (self._pending is not None)
        self._results.clear()
        self._pending = None

    def _check_running(self) -> None:
        if self._state is ExecutorState.FAILED:
            assert self._failure is not None
            raise ExecutorError(one_line(self._failure)) from self._failure
        if self._stopping:
            raise ExecutorError("the executor was stopped")
        if self._state is ExecutorState.STOPPED:
            raise ExecutorError("the executor is not started")

    def _run(self) -> None:
        try:
            if self._on_thread_start is not None:
                self._on_thread_start()
            policy = self._load()
            self._warm_up(policy)
        except BaseException as error:
            # The frames' variables hold the half-loaded weights for as long as the error lives.
            traceback.clear_frames(error.__traceback__)
            self._end(ExecutorState.FAILED, error)
            return
        with self._changed:
            self._policy = policy
            self._state = ExecutorState.READY
            self._changed.notify_all()
        try:
            while (request := self._next_request()) is not None:
                self._serve(policy, request)
                del request
        except BaseException as error:
            self._end(ExecutorState.FAILED, error)
            return
        self._end(ExecutorState.STOPPED)

    def _end(self, state: ExecutorState, failure: BaseException | None = None) -> None:
        with self._changed:
            self._discard()
            self._busy_since_s = None
            self._policy = None
            self._failure = failure
            self._state = state
            self._changed.notify_all()

    def _warm_up(self, policy: Policy) -> None:
        if self._warmup_runs <= 0:
            return
        observation = self._warmup_observation(policy)
        for _ in range(self._warmup_runs):
            if self._stopping:
                return
            check_chunk(policy.infer(observation), policy, observation)

    def _next_request(self) -> _Request | None:
        """Wait for a request; None when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._pending is not None)
            request, self._pending = self._pending, None
            if request is None:
                return None
            self._state = ExecutorState.BUSY
            self._busy_since_s = time.monotonic()
            return request

    def _serve(self, policy: Policy, request: _Request) -> None:
        result = _infer(policy, request)
        with self._changed:
            self._state = ExecutorState.READY
            self._busy_since_s = None
            if request.generation != self._generation:
                self._discarded += 1
                return
            if result.chunk is None:
                self._failed += 1
            else:
                self._completed += 1
                self._latencies_s.append(result.finished_s - result.started_s)
            if len(self._results) == MAX_RESULTS:
                self._results.popleft()
                self._discarded += 1
            self._results.append(result)
        if self._on_result is not None:
            self._on_result()


def _infer(policy: Policy, request: _Request) -> InferenceResult:
    """One inference; whatever is raised becomes the result's error."""
    chunk: ActionChunk | None = None
    error: str | None = None
    device_fault = False
    stamp_s: float | None = None
    started_s = time.monotonic()
    decoded_s: float | None = None
    try:
        observation = request.source()
        decoded_s = time.monotonic()
        stamp_s = observation.stamp_s
        chunk = policy.infer(observation, request.prefix)
        check_chunk(chunk, policy, observation)
    except Exception as exception:
        # Out of memory is an Exception too, Python's and torch's.
        _logger.debug("inference failed", exc_info=True)
        chunk, error = None, one_line(exception)
        device_fault = is_device_fault(exception)
    finished_s = time.monotonic()
    if decoded_s is None:
        decoded_s = finished_s
    return InferenceResult(
        chunk=chunk,
        error=error,
        stamp_s=stamp_s,
        started_s=started_s,
        finished_s=finished_s,
        decode_s=decoded_s - started_s,
        infer_s=finished_s - decoded_s,
        device_fault=device_fault,
    )
