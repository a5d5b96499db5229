"""The one thread that owns the device: it loads the policy, warms it up and runs it.

CUDA graphs and compiled code keep state per thread, so nothing of the policy runs anywhere else.
Whoever submits never waits: a request that has not begun gives way to a newer one, and results
are collected when it suits the caller.

What an inference can come to, and what the executor says of itself.

Whether the policy still answers, and answers with something that can be used.
"""

from __future__ import annotations

import gc
import logging
import math
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
    """The policy cannot be run; one line says why."""


class ExecutorState(Enum):
    """What the thread does."""

    STARTING = "starting"
    """Loading and warming up."""
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    """Loading, warming up or the thread itself raised; there is no thread any more."""
    STOPPED = "stopped"
    """Not started, or ended by `stop`."""


@dataclass(frozen=True)
class InferenceResult:
    """What became of one request: a checked chunk, or an error."""

    chunk: ActionChunk | None
    error: str | None
    """One line, if there is no chunk."""
    stamp_s: float | None
    """Of the observation, on its clock; None if there was none."""
    started_s: float
    """By time.monotonic, as `finished_s`."""
    finished_s: float
    decode_s: float
    """Time for the observation."""
    infer_s: float
    """Time for the chunk, its check included."""
    kind: ErrorKind = ErrorKind.POLICY
    """Of the error."""


@dataclass(frozen=True)
class ExecutorStatistics:
    """Counts of requests since the start, the warm-up left out."""

    completed: int
    failed: int
    replaced: int
    """Gave way to a newer request before they began."""
    discarded: int
    """Thrown away by `discard`, or not collected in time."""
    latencies_s: tuple[float, ...]
    """Decoding and inference of the last completed requests, oldest first."""
    out_of_memory: int = 0
    """Inferences that ran out of memory; each was repeated once."""


def check_chunk(chunk: ActionChunk, policy: Policy, observation: Observation) -> None:
    """Refuse a chunk that must not reach a robot.

    Raises:
        ValueError: If the actions are not finite float64 [horizon, action_dim], `dt_s` is not a
            time, or the stamp is not the observation's, which would shift all steps in time.
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


@dataclass(frozen=True)
class Fault:
    """Why the motion must end; one line for a person."""

    message: str
    device: bool
    """The policy must be loaded again: its device failed, or its thread ended."""
    sticky: bool = False
    """The device fails until the process ends: only a new process can load a policy."""


class Watchdog:
    """Looks at the executor from outside; nothing here waits.

    An inference that takes longer than `hang_timeout_s` counts as hung until it returns. After
    `max_failures` failed ones in a row there is a fault, after one that lost the device there is
    one at once. An observation that could not be made, because an image is damaged, is not the
    policy's failure.
    """

    def __init__(self, hang_timeout_s: float = 2.0, max_failures: int = 3) -> None:
        """Raises ValueError for a time that is not above 0 or a count below 1."""
        if not (math.isfinite(hang_timeout_s) and hang_timeout_s > 0):
            raise ValueError(f"hang_timeout_s must be finite and > 0, got {hang_timeout_s}")
        if max_failures < 1:
            raise ValueError(f"max_failures must be at least 1, got {max_failures}")
        self.hang_timeout_s = hang_timeout_s
        self.max_failures = max_failures
        self.hangs = 0
        self._known_s: float | None = None
        self._failures = 0

    def hang(self, busy_since_s: float | None, now_s: float) -> str | None:
        """The hang in words, while there is one; times by time.monotonic."""
        if busy_since_s is None or now_s - busy_since_s <= self.hang_timeout_s:
            return None
        busy_s = now_s - busy_since_s
        return f"policy: no answer for {busy_s:.1f} s, limit {self.hang_timeout_s:g} s"

    def check_hang(self, busy_since_s: float | None, now_s: float) -> str | None:
        """A hang that was not seen before; it is counted."""
        hang = self.hang(busy_since_s, now_s)
        if hang is None or self._known_s == busy_since_s:
            return None
        self._known_s = busy_since_s
        self.hangs += 1
        return hang

    def record_result(self, result: InferenceResult) -> Fault | None:
        """Count a result; the fault that it completes."""
        if result.chunk is not None:
            self._failures = 0
        elif result.kind is ErrorKind.STICKY:
            return Fault(f"the device is lost: {result.error}", device=True, sticky=True)
        elif result.stamp_s is not None or result.kind is ErrorKind.OUT_OF_MEMORY:
            self._failures += 1
        if self._failures < self.max_failures:
            return None
        return Fault(
            f"{self._failures} inferences failed in a row, the last with {result.error}",
            device=False,
        )

    def reset(self) -> None:
        """A new activation: earlier failures do not count."""
        self._failures = 0


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
        warmup_prefixes: Callable[[Policy], Iterable[ActionPrefix]] | None = None,
        on_thread_start: Callable[[], None] | None = None,
        on_result: Callable[[], None] | None = None,
        on_out_of_memory: Callable[[], None] | None = None,
        on_thread_end: Callable[[], None] | None = None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            load: Makes the policy.
            warmup_runs: Inferences before the policy counts as ready; they pay for compilation
                and must give valid chunks.
            warmup_observation: What these infer on.
            warmup_prefixes: Prefixes to infer with too, where chunks will be guided.
            on_thread_start: Called first, to set up the thread or the device.
            on_result: Called after a result was queued. It must be short and must not raise.
            on_out_of_memory: Called when an inference ran out of memory and what it held is
                dropped, to give memory back to the device; the inference is then repeated once.
            on_thread_end: Called last, when the policy is dropped, to give its memory back.

        All of them run on the thread.
        """
        self._load = load
        self._warmup_runs = warmup_runs
        self._warmup_observation = warmup_observation
        self._warmup_prefixes = warmup_prefixes
        self._on_thread_start = on_thread_start
        self._on_result = on_result
        self._on_out_of_memory = on_out_of_memory
        self._on_thread_end = on_thread_end
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
        self._out_of_memory = 0

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
    def device_lost(self) -> bool:
        """Whether the thread ended by an error that the device keeps until the process ends."""
        with self._changed:
            failure = self._failure
            return failure is not None and error_kind(failure) is ErrorKind.STICKY

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
                self._out_of_memory,
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
        failure: BaseException | None = None
        try:
            self._load_and_serve()
        except BaseException as error:
            # the frames' variables would hold the weights for as long as the error lives
            release_frames(error)
            failure = error
        with self._changed:
            self._policy = None
        gc.collect()
        _call_hook(self._on_thread_end, "at the end of the inference thread")
        self._end(failure)

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

    def _end(self, failure: BaseException | None) -> None:
        with self._changed:
            self._discard()
            self._busy_since_s = None
            self._failure = failure
            self._state = ExecutorState.STOPPED if failure is None else ExecutorState.FAILED
            self._changed.notify_all()

    def _warm_up(self, policy: Policy) -> None:
        if self._warmup_runs <= 0:
            return
        observation = self._warmup_observation(policy)
        prefixes: list[ActionPrefix | None] = [None]
        if self._warmup_prefixes is not None:
            prefixes += self._warmup_prefixes(policy)
        for prefix in prefixes:
            for _ in range(self._warmup_runs):
                if self._stopping:
                    return
                check_chunk(policy.infer(observation, prefix), policy, observation)

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
        if result.kind is ErrorKind.OUT_OF_MEMORY:
            result = self._repeat(policy, request, result)
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

    def _repeat(
        self, policy: Policy, request: _Request, failed: InferenceResult
    ) -> InferenceResult:
        """Once more, after an inference that ran out of memory and when that was given back."""
        with self._changed:
            self._out_of_memory += 1
            wanted = request.generation == self._generation and not self._stopping
        gc.collect()
        _call_hook(self._on_out_of_memory, "after an inference ran out of memory")
        if not wanted:
            return failed
        _logger.warning("%s; the cache is emptied and the inference repeated", failed.error)
        return replace(_infer(policy, request), started_s=failed.started_s)


def _call_hook(hook: Callable[[], None] | None, when: str) -> None:
    """Call a hook that gives memory back; a lost device makes it raise."""
    if hook is None:
        return
    try:
        hook()
    except Exception as error:
        _logger.warning("no memory could be given back %s: %s", when, one_line(error))


def _infer(policy: Policy, request: _Request) -> InferenceResult:
    """One inference; whatever is raised becomes the result's error."""
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
        # Out of memory is an Exception too, Python's and torch's.
        _logger.debug("inference failed", exc_info=True)
        chunk, error = None, one_line(exception)
        kind = error_kind(exception)
        # the frames' variables hold what the inference had made so far, on the device too
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
