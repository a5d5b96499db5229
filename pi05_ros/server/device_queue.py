"""Requests of many connections for one policy: earliest deadline first, on the device's thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pi05_ros.device_errors import ErrorKind, error_kind
from pi05_ros.executor import check_chunk, one_line
from pi05_ros.types import ActionChunk, ActionPrefix, Observation, Policy


class BusyError(RuntimeError):
    """More requests wait than the server takes."""


class InferenceError(RuntimeError):
    """The policy raised, or gave an unusable chunk; one line."""


@dataclass(order=True)
class Job:
    """A request that waits. Ordered by deadline, then by arrival."""

    deadline_s: float
    order: int
    observation: Observation = field(compare=False)
    prefix: ActionPrefix | None = field(compare=False)
    future: Future[ActionChunk] = field(compare=False)


@dataclass
class QueueStatistics:
    """Since the start."""

    completed: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    """Of connections that ended before their turn."""
    batches: int = 0
    busy_s: float = 0.0
    """Time of the device's thread in the policy."""


class DeviceQueue:
    """Loads a policy on one thread and runs requests there. All methods are thread safe.

    With one request per connection at a time and deadlines that begin at the connection's last
    answer, the connection that has waited longest is served first: every connection has an equal
    share.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        max_batch: int = 1,
        max_waiting: int = 256,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """Take the loader, which runs on the thread; `start` begins.

        Args:
            load: makes the policy.
            max_batch: requests that are inferred together if more than one waits and the policy
                has `infer_batch`.
            max_waiting: further requests are refused.
            on_lost: called on the thread if the device fails until the process ends.
        """
        self._on_lost = on_lost
        if max_batch < 1 or max_waiting < 1:
            raise ValueError("max_batch and max_waiting must be at least 1")
        self._load, self._max_batch, self._max_waiting = load, max_batch, max_waiting
        self._changed = threading.Condition()
        self._jobs: list[Job] = []
        self._order = itertools.count()
        self._stopping = False
        self._policy: Future[Policy] = Future()
        self.statistics = QueueStatistics()
        self._thread = threading.Thread(target=self._run, name="pi05_device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> Policy:
        """The policy, for its properties; raises what loading raised."""
        return self._policy.result(timeout_s)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        with self._changed:
            return len(self._jobs)

    def submit(
        self, observation: Observation, prefix: ActionPrefix | None, deadline_s: float
    ) -> Future[ActionChunk]:
        """Queue a request; `deadline_s` by time.monotonic. A cancelled future is skipped.

        Raises:
            BusyError: `max_waiting` requests wait, or the queue was stopped.
        """
        with self._changed:
            if self._stopping:
                raise BusyError("the server ends")
            if len(self._jobs) >= self._max_waiting:
                self.statistics.refused += 1
                raise BusyError(f"busy: {len(self._jobs)} requests wait; try again later")
            future: Future[ActionChunk] = Future()
            self._jobs.append(Job(deadline_s, next(self._order), observation, prefix, future))
            self._changed.notify_all()
            return future

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Refuse what waits and end the thread; False if an inference still runs."""
        with self._changed:
            self._stopping = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            policy = self._load()
        except BaseException as error:
            self._policy.set_exception(error)
            return
        self._policy.set_result(policy)
        while (jobs := self._next(policy)) is not None:
            started_s = time.monotonic()
            self._serve(policy, jobs)
            self.statistics.busy_s += time.monotonic() - started_s
            self.statistics.batches += 1

    def _next(self, policy: Policy) -> list[Job] | None:
        """The most urgent request, and others that can be inferred with it; None at the end."""
        limit = self._max_batch if hasattr(policy, "infer_batch") else 1
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._stopping or self._jobs)
                if self._stopping:
                    return None
                chosen = self._choose(limit)
                if chosen:
                    return chosen

    def _choose(self, limit: int) -> list[Job]:
        """Take the first requests by deadline; one with a prefix is inferred alone."""
        chosen: list[Job] = []
        for job in sorted(self._jobs):
            alone = job.prefix is not None
            if len(chosen) == limit or (chosen and (alone or chosen[0].prefix is not None)):
                break
            self._jobs.remove(job)
            if job.future.set_running_or_notify_cancel():
                chosen.append(job)
            else:
                self.statistics.cancelled += 1
        return chosen

    def _serve(self, policy: Any, jobs: Sequence[Job]) -> None:
        try:
            if len(jobs) == 1:
                chunks = [policy.infer(jobs[0].observation, jobs[0].prefix)]
            else:
                chunks = policy.infer_batch([job.observation for job in jobs])
            for job, chunk in zip(jobs, chunks, strict=True):
                check_chunk(chunk, policy, job.observation)
        except Exception as error:  # a policy may raise anything
            if error_kind(error) is ErrorKind.STICKY and self._on_lost is not None:
                self._on_lost(one_line(error))
            elif len(jobs) > 1:
                # one robot's bad observation must not cost the others their chunks
                for job in jobs:
                    self._serve(policy, [job])
                return
            self.statistics.failed += len(jobs)
            for job in jobs:
                job.future.set_exception(InferenceError(one_line(error)))
            return
        self.statistics.completed += len(jobs)
        for job, chunk in zip(jobs, chunks, strict=True):
            job.future.set_result(chunk)
