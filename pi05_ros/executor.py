"""Runs a policy on the one thread that owns the device.

CUDA graphs and compiled code keep state per thread, so loading, warm-up and every inference run
there. `submit` never blocks: a pending request is replaced by a newer one, and results are polled.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from pi05_ros.device_errors import ErrorKind, error_kind, release_frames
from pi05_ros.types import ActionChunk, ActionPrefix, Observation, Policy


class ExecutorError(RuntimeError):
    """The policy cannot run."""


class ExecutorState(Enum):
    """State of the inference thread."""

    STARTING = "starting"
    """Loading and warming up."""
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    """Loading, warm-up or the thread itself raised; the thread has ended."""
    STOPPED = "stopped"
    """Not started, or ended by `stop`."""


@dataclass(frozen=True)
class InferenceResult:
    """Result of one request: a checked chunk, or an error."""

    chunk: ActionChunk | None
    error: str | None
    """One line; None with a chunk."""
    stamp_s: float | None
    """Of the observation, on its clock; None without an observation."""
    started_s: float
    """By time.monotonic, as `finished_s`."""
    finished_s: float
    decode_s: float
    """Duration of making the observation."""
    infer_s: float
    """Duration of inference and of the chunk's check."""
    kind: ErrorKind = ErrorKind.POLICY
    """Kind of `error`."""


@dataclass
class ExecutorStatistics:
    """Counts of requests since the start, without the warm-up."""

    completed: int = 0
    failed: int = 0
    replaced: int = 0
    """Pending requests replaced by a newer one."""
    discarded: int = 0
    """Dropped by `discard`, or not collected in time."""
    out_of_memory: int = 0
    """Inferences that ran out of memory; each is repeated once."""


def check_chunk(chunk: ActionChunk, policy: Policy, observation: Observation) -> None:
    """Check what a policy returns before it can reach a robot.

    Raises:
        ValueError: the actions are not finite float64 [horizon, action_dim], `dt_s` is not above
            0, or the stamp is not the observation's, which would shift all steps in time.
    """
    actions = chunk.actions
    expected = (policy.horizon, policy.action_dim)
    if not isinstance(actions, np.ndarray) or actions.dtype != np.float64:
        kind = getattr(actions, "dtype", type(actions).__name__)
        raise ValueError(f"actions are {kind}, must be a NumPy array of float64")
    if actions.shape != expected:
        raise ValueError(
            f"actions are {list(actions.shape)}, the policy's horizon and action_dim promise "
            f"{list(expected)}"
        )
    finite = np.isfinite(actions)
    if not finite.all():
        step, dimension = (int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{int((~finite).sum())} of {actions.size} actions are not finite, first "
            f"{actions[step, dimension]} at step {step}, dimension {dimension}"
        )
    if not (np.isfinite(chunk.dt_s) and chunk.dt_s > 0):
        raise ValueError(f"dt_s is {chunk.dt_s}, must be above 0")
    if chunk.stamp_s != observation.stamp_s:
        raise ValueError(
            f"the chunk's stamp {chunk.stamp_s} is not the observation's {observation.stamp_s}"
        )


def one_line(error: BaseException) -> str:
    """Type and text of an error, for a log."""
    return " ".join(f"{type(error).__name__}: {error}".split())


MAX_RESULTS = 16
"""Older results that were not collected count as discarded."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    source: Callable[[], Observation]
    prefix: ActionPrefix | None
    generation: int


def black_observation(policy: Policy) -> Observation:
    """Observation for the warm-up: black 480 × 640 images of all cameras, a zero state."""
    steps = getattr(policy, "history_steps", 0)
    present, *past = (
        Observation(
            images={name: np.zeros((480, 640, 3), dtype=np.uint8) for name in policy.cameras},
            state=np.zeros(policy.state_dim),
            instruction="warm up",
            stamp_s=-step * policy.dt_s,
        )
        for step in range(steps + 1)
    )
    return replace(present, past=tuple(reversed(past)))


class InferenceExecutor:
    """Runs a policy on its own thread, newest request first.

    All methods are thread safe and return at once, except `wait_ready` and `stop`, which take a
    time limit. An executor starts once.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        *,
        warmup_runs: int = 2,
        warmup_prefixes: Callable[[Policy], Iterable[ActionPrefix]] | None = None,
        on_thread_start: Callable[[], None] | None = None,
        on_result: Callable[[], None] | None = None,
        on_out_of_memory: Callable[[], None] | None = None,
        on_thread_end: Callable[[], None] | None = None,
    ) -> None:
        """Take the policy's loader and hooks, all of which run on the thread.

        Args:
            load: makes the policy.
            warmup_runs: inferences before the policy is ready. They pay for compilation and must
                give valid chunks.
            warmup_prefixes: makes further prefixes of the warm-up, for guided chunks.
            on_thread_start: sets up the thread or the device.
            on_result: called after a result is queued; short, must not raise.
            on_out_of_memory: frees device memory after an inference that ran out of it; the
                inference is then repeated once.
            on_thread_end: frees device memory after the policy is dropped.
        """
        self._load = load
        self._warmup_runs = warmup_runs
        self._warmup_prefixes = warmup_prefixes
        self._on_thread_start = on_thread_start
        self._on_result = on_result
        self._on_out_of_memory = on_out_of_memory
        self._on_thread_end = on_thread_end
        self._changed = threading.Condition()
        # A daemon: a hung policy must not keep the process alive.
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
        self._statistics = ExecutorStatistics()

    @property
    def state(self) -> ExecutorState:
        with self._changed:
            return self._state

    @property
    def failure(self) -> str | None:
        """Error that ended the thread, in one line."""
        with self._changed:
            return None if self._failure is None else one_line(self._failure)

    @property
    def device_lost(self) -> bool:
        """Whether the thread ended by an error that persists until the process ends."""
        with self._changed:
            failure = self._failure
            return failure is not None and error_kind(failure) is ErrorKind.STICKY

    @property
    def busy_since_s(self) -> float | None:
        """Start of the running request, by time.monotonic; None without one."""
        with self._changed:
            return self._busy_since_s

    @property
    def statistics(self) -> ExecutorStatistics:
        with self._changed:
            return replace(self._statistics)

    def start(self) -> None:
        """Start the thread, which loads the policy and warms it up.

        Raises:
            ExecutorError: the executor was started or stopped before.
        """
        with self._changed:
            if self._started or self._stopping:
                raise ExecutorError("an executor starts once, make another one")
            self._started = True
            self._state = ExecutorState.STARTING
            self._thread.start()

    def wait_ready(self, timeout_s: float) -> Policy:
        """Wait for the warm policy and return it, for its properties; only the thread runs it.

        Raises:
            ExecutorError: loading or warm-up raised (the cause is attached) or takes longer than
                `timeout_s`, or the executor is not running.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state is not ExecutorState.STARTING, timeout_s)
            if self._state is ExecutorState.STARTING:
                raise ExecutorError(f"the policy is not ready after {timeout_s:g} s")
            self._check_running()
            assert self._policy is not None
            return self._policy

    def submit(self, source: Callable[[], Observation], prefix: ActionPrefix | None = None) -> None:
        """Request an inference; a pending request is replaced.

        Args:
            source: makes the observation, on the thread.
            prefix: actions in policy units that the chunk continues.

        Raises:
            ExecutorError: the executor has failed, is stopping or was not started.
        """
        with self._changed:
            self._check_running()
            if self._pending is not None:
                self._statistics.replaced += 1
            self._pending = _Request(source, prefix, self._generation)
            self._changed.notify_all()

    @property
    def has_results(self) -> bool:
        """Whether a result waits."""
        with self._changed:
            return bool(self._results)

    def results(self) -> list[InferenceResult]:
        """Take the results that wait, oldest first; at most `MAX_RESULTS` are kept."""
        with self._changed:
            results = list(self._results)
            self._results.clear()
            return results

    def discard(self) -> None:
        """Drop all requests so far: pending, running or not yet collected."""
        with self._changed:
            self._discard()

    def stop(self, timeout_s: float) -> bool:
        """Drop all requests and end the thread.

        Returns:
            False if the policy still runs after `timeout_s`. The thread ends when it returns;
            the end of the process does not wait for it.
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
        self._statistics.discarded += len(self._results) + (self._pending is not None)
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
        failure: BaseException | None = None
        try:
            self._load_and_serve()
        except BaseException as error:
            # The frames' variables would hold the weights as long as the error lives.
            release_frames(error)
            failure = error
        with self._changed:
            self._policy = None
        gc.collect()
        _call_hook(self._on_thread_end, "at the end of the inference thread")
        with self._changed:
            self._discard()
            self._busy_since_s = None
            self._failure = failure
            self._state = ExecutorState.STOPPED if failure is None else ExecutorState.FAILED
            self._changed.notify_all()

    def _load_and_serve(self) -> None:
        if self._on_thread_start is not None:
            self._on_thread_start()
        policy = self._load()
        self._warm_up(policy)
        with self._changed:
            self._policy = policy
            self._state = ExecutorState.READY
            self._changed.notify_all()
        while (request := self._next_request()) is not None:
            self._serve(policy, request)
            del request

    def _warm_up(self, policy: Policy) -> None:
        observation = black_observation(policy)
        prefixes: list[ActionPrefix | None] = [None]
        if self._warmup_prefixes is not None:
            prefixes += self._warmup_prefixes(policy)
        for prefix in prefixes:
            for _ in range(self._warmup_runs):
                if self._stopping:
                    return
                check_chunk(policy.infer(observation, prefix), policy, observation)

    def _next_request(self) -> _Request | None:
        """Wait for a request; None when the thread is to end."""
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
        if result.kind is ErrorKind.OUT_OF_MEMORY:
            result = self._repeat(policy, request, result)
        with self._changed:
            self._state = ExecutorState.READY
            self._busy_since_s = None
            if request.generation != self._generation:
                self._statistics.discarded += 1
                return
            if result.chunk is None:
                self._statistics.failed += 1
            else:
                self._statistics.completed += 1
            if len(self._results) == MAX_RESULTS:
                self._results.popleft()
                self._statistics.discarded += 1
            self._results.append(result)
        if self._on_result is not None:
            self._on_result()

    def _repeat(
        self, policy: Policy, request: _Request, failed: InferenceResult
    ) -> InferenceResult:
        """Free memory and repeat an inference that ran out of it."""
        with self._changed:
            self._statistics.out_of_memory += 1
            wanted = request.generation == self._generation and not self._stopping
        gc.collect()
        _call_hook(self._on_out_of_memory, "after an inference ran out of memory")
        if not wanted:
            return failed
        _logger.warning("%s; the cache is emptied and the inference repeated", failed.error)
        return replace(_infer(policy, request), started_s=failed.started_s)


def _call_hook(hook: Callable[[], None] | None, when: str) -> None:
    """Call a hook that frees memory; it raises after the device is lost."""
    if hook is None:
        return
    try:
        hook()
    except Exception as error:
        _logger.warning("no memory could be given back %s: %s", when, one_line(error))


def _infer(policy: Policy, request: _Request) -> InferenceResult:
    """Run one inference; an exception becomes the result's error."""
    chunk: ActionChunk | None = None
    error: str | None = None
    kind = ErrorKind.POLICY
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
        _logger.debug("inference failed", exc_info=True)
        chunk, error = None, one_line(exception)
        kind = error_kind(exception)
        # The frames' variables hold the inference's tensors on the device.
        release_frames(exception)
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
        kind=kind,
    )
