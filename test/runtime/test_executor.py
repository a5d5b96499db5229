"""Faults pinned: an old observation inferred instead of the newest, a result after discard or stop,
an exception that ends the thread, a chunk with NaN or another shape reaching the robot, a policy
that hangs and takes the process with it, device work on more than one thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from pi05_ros.device_errors import ErrorKind
from pi05_ros.executor import (
    MAX_RESULTS,
    ExecutorError,
    ExecutorState,
    InferenceExecutor,
    InferenceResult,
)
from pi05_ros.types import ActionChunk, ActionPrefix, Observation

TIMEOUT_S = 10.0


class FakePolicy:
    """Answers with the observation's state as every action; `gate` holds it inside infer."""

    horizon = 4
    dt_s = 0.02
    state_dim = 2
    action_dim = 2
    cameras = ("high", "wrist")
    description = "a fake"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.seen: list[Observation] = []
        self.threads: list[threading.Thread] = []
        self.spoil: Callable[[ActionChunk], ActionChunk] | None = None

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self.seen.append(observation)
        self.threads.append(threading.current_thread())
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        actions = np.tile(observation.state, (self.horizon, 1))
        chunk = ActionChunk(actions, observation.stamp_s, self.dt_s, observation.instruction)
        return self.spoil(chunk) if self.spoil else chunk


def observation(stamp_s: float) -> Observation:
    return Observation({}, np.array([stamp_s, 0.0]), "lift", stamp_s)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.001)


def collect(executor: InferenceExecutor, count: int) -> list[InferenceResult]:
    results: list[InferenceResult] = []

    def enough() -> bool:
        results.extend(executor.results())
        return len(results) >= count

    wait_until(enough)
    return results


@pytest.fixture
def policy() -> FakePolicy:
    return FakePolicy()


@pytest.fixture
def executor(policy: FakePolicy) -> Iterator[InferenceExecutor]:
    executor = InferenceExecutor(lambda: policy, warmup_runs=0)
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    yield executor
    policy.gate.set()
    assert executor.stop(TIMEOUT_S)


def hold(executor: InferenceExecutor, policy: FakePolicy, stamp_s: float = 1.0) -> None:
    """Leave the thread inside the policy with a first request."""
    policy.gate.clear()
    executor.submit(lambda: observation(stamp_s))
    assert policy.entered.acquire(timeout=TIMEOUT_S)


def test_a_request_becomes_a_chunk_with_its_times(
    executor: InferenceExecutor, policy: FakePolicy
) -> None:
    before_s = time.monotonic()

    def source() -> Observation:
        time.sleep(0.02)
        return observation(7.0)

    executor.submit(source)
    (result,) = collect(executor, 1)
    assert result.chunk is not None and result.error is None
    assert result.stamp_s == result.chunk.stamp_s == 7.0
    np.testing.assert_array_equal(result.chunk.actions, np.tile([7.0, 0.0], (4, 1)))
    assert before_s <= result.started_s <= result.finished_s <= time.monotonic()
    assert result.decode_s >= 0.02
    assert result.decode_s + result.infer_s == pytest.approx(result.finished_s - result.started_s)
    statistics = executor.statistics
    assert (statistics.completed, statistics.failed) == (1, 0)
    assert executor.results() == []


def test_the_newest_request_wins_and_a_replaced_one_is_never_decoded(
    executor: InferenceExecutor, policy: FakePolicy
) -> None:
    hold(executor, policy)
    decoded = []

    def source(stamp_s: float) -> Callable[[], Observation]:
        def decode() -> Observation:
            decoded.append(stamp_s)
            return observation(stamp_s)

        return decode

    for stamp_s in (2.0, 3.0, 4.0):
        executor.submit(source(stamp_s))
    policy.gate.set()
    assert [result.stamp_s for result in collect(executor, 2)] == [1.0, 4.0]
    assert decoded == [4.0]
    assert executor.statistics.replaced == 2


def test_results_come_in_order_and_are_bounded(
    executor: InferenceExecutor, policy: FakePolicy
) -> None:
    count = MAX_RESULTS + 3
    for i in range(count):
        executor.submit(partial(observation, float(i)))
        wait_until(lambda: executor.statistics.completed == i + 1)  # noqa: B023
    stamps_s = [result.stamp_s for result in executor.results()]
    assert stamps_s == [float(i) for i in range(3, count)]
    assert executor.statistics.discarded == 3


def test_state_and_busy_time_are_exposed(executor: InferenceExecutor, policy: FakePolicy) -> None:
    assert executor.state is ExecutorState.READY and executor.busy_since_s is None
    before_s = time.monotonic()
    hold(executor, policy)
    assert executor.state is ExecutorState.BUSY
    busy_since_s = executor.busy_since_s
    assert busy_since_s is not None and before_s <= busy_since_s <= time.monotonic()
    policy.gate.set()
    collect(executor, 1)
    assert executor.state is ExecutorState.READY and executor.busy_since_s is None


def test_discard_throws_away_what_is_pending_in_work_and_not_collected(
    executor: InferenceExecutor, policy: FakePolicy
) -> None:
    executor.submit(lambda: observation(0.5))
    wait_until(lambda: executor.statistics.completed == 1)
    policy.entered.acquire()
    hold(executor, policy, 1.0)
    executor.submit(lambda: observation(2.0))
    executor.discard()
    assert executor.results() == []
    executor.submit(lambda: observation(3.0))
    policy.gate.set()
    assert [result.stamp_s for result in collect(executor, 1)] == [3.0]
    assert [seen.stamp_s for seen in policy.seen] == [0.5, 1.0, 3.0]
    assert executor.statistics.discarded == 3
    assert executor.statistics.completed == 2


@pytest.mark.parametrize("where", ["source", "infer"])
@pytest.mark.parametrize(
    "fault", [RuntimeError("CUDA error:\ndevice-side assert"), MemoryError("no memory")]
)
def test_an_exception_becomes_an_error_and_the_thread_continues(
    executor: InferenceExecutor, policy: FakePolicy, where: str, fault: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise fault

    if where == "infer":
        policy.spoil = fail
    executor.submit(fail if where == "source" else lambda: observation(1.0))
    (result,) = collect(executor, 1)
    assert result.chunk is None
    assert result.error == " ".join(f"{type(fault).__name__}: {fault}".split())
    assert result.stamp_s == (None if where == "source" else 1.0)
    policy.spoil = None
    executor.submit(lambda: observation(2.0))
    assert collect(executor, 1)[0].chunk is not None
    statistics = executor.statistics
    assert (statistics.completed, statistics.failed) == (1, 1)


def with_actions(actions: Any) -> Callable[[ActionChunk], ActionChunk]:
    return lambda chunk: replace(chunk, actions=actions)


def one_nan(chunk: ActionChunk) -> ActionChunk:
    chunk.actions[2, 1] = np.nan
    return chunk


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (one_nan, "1 of 8 actions are not finite, first nan at step 2, dimension 1"),
        (with_actions(np.full((4, 2), np.inf)), "8 of 8 actions are not finite"),
        (with_actions(np.zeros((3, 2))), "actions are [3, 2], the policy's horizon"),
        (with_actions(np.zeros((4, 3))), "promise [4, 2]"),
        (with_actions(np.zeros((1, 4, 2))), "actions are [1, 4, 2]"),
        (with_actions(np.zeros((4, 2), np.float32)), "actions are float32, must be"),
        (with_actions([[0.0, 0.0]] * 4), "actions are list, must be"),
        (lambda chunk: replace(chunk, dt_s=0.0), "dt_s is 0.0"),
        (lambda chunk: replace(chunk, dt_s=float("nan")), "dt_s is nan"),
        (lambda chunk: replace(chunk, stamp_s=9.0), "stamp 9.0 is not the observation's 1.0"),
        (lambda chunk: None, "AttributeError"),
    ],
)
def test_a_chunk_that_must_not_move_a_robot_is_an_error(
    executor: InferenceExecutor, policy: FakePolicy, spoil: Any, error: str
) -> None:
    policy.spoil = spoil
    executor.submit(lambda: observation(1.0))
    (result,) = collect(executor, 1)
    assert result.chunk is None
    assert result.error is not None and error in result.error
    assert "\n" not in result.error


def test_all_work_is_on_one_thread(policy: FakePolicy) -> None:
    threads: list[threading.Thread] = []

    def note(value: Any = None) -> Any:
        threads.append(threading.current_thread())
        return value

    executor = InferenceExecutor(
        lambda: note(policy),
        warmup_runs=2,
        on_thread_start=note,
        on_result=note,
    )
    executor.start()
    assert executor.wait_ready(TIMEOUT_S) is policy
    executor.submit(lambda: note(observation(1.0)))
    wait_until(lambda: len(threads) == 4)
    assert set(threads + policy.threads) == {executor._thread}
    assert executor._thread is not threading.current_thread()
    assert len(policy.threads) == 3
    assert executor.stop(TIMEOUT_S)


def test_warm_up_sees_what_the_policy_wants_and_is_not_counted(policy: FakePolicy) -> None:
    executor = InferenceExecutor(lambda: policy)
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    assert len(policy.seen) == 2
    warm = policy.seen[0]
    assert {name: image.shape for name, image in warm.images.items()} == {
        "high": (480, 640, 3),
        "wrist": (480, 640, 3),
    }
    assert warm.images["high"].dtype == np.uint8 and warm.state.shape == (2,)
    assert executor.results() == []
    assert executor.statistics.completed == 0
    assert executor.stop(TIMEOUT_S)


def test_a_request_during_the_start_waits_for_the_warm_policy(policy: FakePolicy) -> None:
    loading = threading.Event()

    def load() -> FakePolicy:
        assert loading.wait(TIMEOUT_S)
        return policy

    executor = InferenceExecutor(load, warmup_runs=1)
    executor.start()
    assert executor.state is ExecutorState.STARTING
    with pytest.raises(ExecutorError, match=r"not ready after 0\.01 s"):
        executor.wait_ready(0.01)
    executor.submit(lambda: observation(1.0))
    loading.set()
    assert collect(executor, 1)[0].stamp_s == 1.0
    assert executor.stop(TIMEOUT_S)


def test_guided_inference_is_warmed_up_before_the_policy_counts_as_ready(
    policy: FakePolicy,
) -> None:
    """Fault: the first guided chunk compiles while the arms move."""
    wanted = ActionPrefix(np.zeros((3, 2)), 1)
    prefixes: list[ActionPrefix | None] = []
    infer = policy.infer

    def noted(observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        prefixes.append(prefix)
        return infer(observation, prefix)

    policy.infer = noted  # type: ignore[method-assign]
    executor = InferenceExecutor(lambda: policy, warmup_prefixes=lambda _: [wanted])
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    assert prefixes == [None, None, wanted, wanted]
    assert executor.stop(TIMEOUT_S)


@pytest.mark.parametrize("where", ["load", "warm-up", "thread start"])
def test_a_failed_start_names_its_cause(policy: FakePolicy, where: str) -> None:
    fault = FileNotFoundError("config.json\nis missing")

    def fail(*_: Any) -> Any:
        raise fault

    if where == "warm-up":
        policy.spoil = fail
    executor = InferenceExecutor(
        fail if where == "load" else lambda: policy,
        on_thread_start=fail if where == "thread start" else None,
    )
    executor.start()
    with pytest.raises(ExecutorError) as error:
        executor.wait_ready(TIMEOUT_S)
    assert str(error.value) == "FileNotFoundError: config.json is missing"
    assert error.value.__cause__ is fault
    assert executor.state is ExecutorState.FAILED
    with pytest.raises(ExecutorError, match=r"config\.json is missing"):
        executor.submit(lambda: observation(1.0))
    assert executor.stop(TIMEOUT_S)


def test_a_failed_load_gives_its_memory_back_while_its_error_is_kept() -> None:
    weights: list[weakref.ref[np.ndarray]] = []

    def load() -> FakePolicy:
        half = np.zeros(1000)
        weights.append(weakref.ref(half))
        raise MemoryError("the other half does not fit")

    executor = InferenceExecutor(load)
    executor.start()
    with pytest.raises(ExecutorError, match="other half") as error:
        executor.wait_ready(TIMEOUT_S)
    assert weights[0]() is None
    assert error.value.__cause__ is not None
    assert executor.stop(TIMEOUT_S)


def test_a_policy_that_warms_up_to_nan_never_gets_ready(policy: FakePolicy) -> None:
    policy.spoil = one_nan
    executor = InferenceExecutor(lambda: policy)
    executor.start()
    with pytest.raises(ExecutorError, match="not finite"):
        executor.wait_ready(TIMEOUT_S)
    assert executor.stop(TIMEOUT_S)


def test_a_policy_that_ends_the_thread_fails_the_executor(policy: FakePolicy) -> None:
    def leave(chunk: ActionChunk) -> ActionChunk:
        raise SystemExit("a library called exit")

    executor = InferenceExecutor(lambda: policy, warmup_runs=0)
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    policy.spoil = leave
    executor.submit(lambda: observation(1.0))
    wait_until(lambda: executor.state is ExecutorState.FAILED)
    assert executor.busy_since_s is None
    with pytest.raises(ExecutorError, match="SystemExit: a library called exit"):
        executor.submit(lambda: observation(2.0))


def test_stop_gives_up_on_a_policy_that_hangs_and_nothing_comes_after(
    executor: InferenceExecutor, policy: FakePolicy
) -> None:
    hold(executor, policy)
    assert executor._thread.daemon
    assert executor.stop(0.02) is False
    assert executor.busy_since_s is not None
    with pytest.raises(ExecutorError, match="was stopped"):
        executor.submit(lambda: observation(2.0))
    policy.gate.set()
    wait_until(lambda: executor.state is ExecutorState.STOPPED)
    assert executor.results() == []
    assert executor.statistics.completed == 0
    assert executor.stop(TIMEOUT_S) is True
    with pytest.raises(ExecutorError, match="was stopped"):
        executor.wait_ready(0.01)


def test_stop_during_the_start_ends_before_any_request(policy: FakePolicy) -> None:
    policy.gate.clear()
    executor = InferenceExecutor(lambda: policy, warmup_runs=3)
    executor.start()
    assert policy.entered.acquire(timeout=TIMEOUT_S)
    executor.submit(lambda: observation(1.0))
    assert executor.stop(0.02) is False
    policy.gate.set()
    assert executor.stop(TIMEOUT_S)
    assert executor.state is ExecutorState.STOPPED
    assert len(policy.seen) == 1


def test_stop_from_the_executor_thread_does_not_wait_for_itself(policy: FakePolicy) -> None:
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(one.stop(TIMEOUT_S))

    one = InferenceExecutor(lambda: policy, warmup_runs=0, on_result=stop)
    one.start()
    one.submit(lambda: observation(1.0))
    wait_until(lambda: one.state is ExecutorState.STOPPED)
    assert stopped == [False]


def test_an_executor_starts_once(policy: FakePolicy) -> None:
    executor = InferenceExecutor(lambda: policy)
    assert executor.state is ExecutorState.STOPPED
    with pytest.raises(ExecutorError, match="not started"):
        executor.submit(lambda: observation(1.0))
    executor.start()
    with pytest.raises(ExecutorError, match="starts once"):
        executor.start()
    assert executor.stop(TIMEOUT_S)
    unused = InferenceExecutor(lambda: policy)
    assert unused.stop(0.0) is True
    with pytest.raises(ExecutorError, match="starts once"):
        unused.start()


class Weights:
    """What a weak reference can be made to."""


def test_out_of_memory_is_recovered_by_one_repetition(
    policy: FakePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults: a chunk lost, or the policy unloaded, where emptying the cache is enough; memory that
    the failed inference holds while the cache is emptied."""
    held: list[weakref.ref[Weights]] = []
    freed: list[bool] = []

    def too_much(chunk: ActionChunk) -> ActionChunk:
        half = Weights()
        held.append(weakref.ref(half))
        try:
            raise KeyError("what came before")
        except KeyError as before:
            raise MemoryError("the other half does not fit") from before

    def empty_cache() -> None:
        freed.append(held[-1]() is None)
        policy.spoil = None

    executor = InferenceExecutor(lambda: policy, warmup_runs=0, on_out_of_memory=empty_cache)
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    policy.spoil = too_much
    executor.submit(lambda: observation(1.0))
    (result,) = collect(executor, 1)
    assert result.chunk is not None and result.error is None
    assert freed == [True]
    statistics = executor.statistics
    assert (statistics.completed, statistics.failed, statistics.out_of_memory) == (1, 0, 1)
    assert "MemoryError: the other half does not fit" in caplog.text
    assert executor.stop(TIMEOUT_S)


def test_a_second_out_of_memory_is_one_failure_and_the_thread_continues(policy: FakePolicy) -> None:
    """Faults: an endless repetition; a hook that raises and ends the thread."""
    calls: list[None] = []

    def full(chunk: ActionChunk) -> ActionChunk:
        raise MemoryError("no memory")

    def fail() -> None:
        calls.append(None)
        raise RuntimeError("CUDA error: unspecified launch failure")

    executor = InferenceExecutor(lambda: policy, warmup_runs=0, on_out_of_memory=fail)
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    policy.spoil = full
    executor.submit(lambda: observation(1.0))
    (result,) = collect(executor, 1)
    assert result.chunk is None and result.kind is ErrorKind.OUT_OF_MEMORY
    assert (len(calls), len(policy.seen)) == (1, 2)
    policy.spoil = None
    executor.submit(lambda: observation(2.0))
    assert collect(executor, 1)[0].chunk is not None
    assert executor.stop(TIMEOUT_S)


def test_a_discarded_request_that_ran_out_of_memory_is_not_repeated(policy: FakePolicy) -> None:
    def full(chunk: ActionChunk) -> ActionChunk:
        one.discard()
        raise MemoryError("no memory")

    one = InferenceExecutor(lambda: policy, warmup_runs=0)
    one.start()
    one.wait_ready(TIMEOUT_S)
    policy.spoil = full
    one.submit(lambda: observation(1.0))
    wait_until(lambda: one.statistics.discarded == 1)
    assert len(policy.seen) == 1 and one.results() == []
    assert one.stop(TIMEOUT_S)


@pytest.mark.parametrize("end", ["stop", "failure"])
def test_the_thread_drops_the_policy_before_it_gives_memory_back(end: str) -> None:
    """Fault: two networks on the device after cleanup and a second configure."""
    made: list[weakref.ref[FakePolicy]] = []
    gone: list[bool] = []

    def load() -> FakePolicy:
        policy = FakePolicy()
        policy.itself = policy  # type: ignore[attr-defined]
        made.append(weakref.ref(policy))
        return policy

    executor = InferenceExecutor(load, on_thread_end=lambda: gone.append(made[0]() is None))
    executor.start()
    executor.wait_ready(TIMEOUT_S)
    if end == "stop":
        executor.submit(lambda: observation(1.0))
        collect(executor, 1)
    else:

        def leave(chunk: ActionChunk) -> ActionChunk:
            raise SystemExit("a library called exit")

        made[0]().spoil = leave  # type: ignore[union-attr]
        executor.submit(lambda: observation(1.0))
        wait_until(lambda: executor.state is ExecutorState.FAILED)
        assert not executor.device_lost
    assert executor.stop(TIMEOUT_S)
    assert gone == [True]


def test_a_device_lost_during_loading_is_reported() -> None:
    """Fault: configure tried again and again in a process whose CUDA context is dead."""

    def load() -> FakePolicy:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    executor = InferenceExecutor(load)
    executor.start()
    with pytest.raises(ExecutorError, match="illegal memory access"):
        executor.wait_ready(TIMEOUT_S)
    assert executor.device_lost
    assert executor.stop(TIMEOUT_S)
