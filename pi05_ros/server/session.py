"""The requests of one connection, whatever carries its frames."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pi05_ros.protocol import ProtocolError, pack, unpack
from pi05_ros.server.device_queue import BusyError, DeviceQueue, InferenceError
from pi05_ros.server.dialects import Dialect, Expected, Request, answer, failure, read_request
from pi05_ros.types import ActionChunk, Policy

Closed = Callable[[], Coroutine[Any, Any, Any]]
RECENT = 1000
"""Requests behind the percentiles."""


class ConnectionGone(Exception):
    """The connection ended while its request waited."""


class Reply(NamedTuple):
    """What is sent back: text or a binary frame."""

    data: str | bytes
    ends: bool
    """Whether the connection ends with it, with code 1011."""


@dataclass
class Statistics:
    """Of all connections since the start."""

    connections: int = 0
    open: int = 0
    requests: int = 0
    errors: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Of the last requests, from the message to its answer."""


class Session:
    """Answers one request after the other."""

    def __init__(
        self, queue: DeviceQueue, expected: Expected, dialect: Dialect, statistics: Statistics
    ) -> None:
        self._queue, self._expected, self._dialect = queue, expected, dialect
        self._statistics = statistics
        self._answered_s = time.monotonic()
        self._previous_s = 0.0

    async def answer(self, data: str | bytes, closed: Closed | None = None) -> Reply:
        """The reply to a frame; errors are replies too.

        Args:
            data: a frame.
            closed: waits until the connection ends, which drops the request; it is cancelled.

        Raises:
            ConnectionGone: `closed` returned first.
        """
        started_s = time.monotonic()
        statistics, dialect = self._statistics, self._dialect
        statistics.requests += 1
        statistics.received_bytes += len(data)
        try:
            message: Any = {"status": "reset successful"}
            request = self._read(data)
            if request.observation is not None:
                chunk = await self._infer(request, closed)
                times_s = {"infer_ms": time.monotonic() - started_s}
                if self._previous_s:
                    times_s["prev_total_ms"] = self._previous_s
                message = answer(chunk, dialect, times_s)
        except (ProtocolError, BusyError, InferenceError) as error:
            statistics.errors += 1
            found = failure(str(error), dialect)
            ends = dialect is not Dialect.VLLM and not isinstance(error, BusyError)
            return Reply(found if isinstance(found, str) else pack(found), ends)
        packed = pack(message)
        statistics.sent_bytes += len(packed)
        self._answered_s = time.monotonic()
        self._previous_s = self._answered_s - started_s
        statistics.latencies_s.append(self._previous_s)
        return Reply(packed, ends=False)

    def _read(self, data: str | bytes) -> Request:
        if isinstance(data, str):
            raise ProtocolError("a request must be a binary frame, got text")
        return read_request(unpack(data), self._expected, time.time())

    async def _infer(self, request: Request, closed: Closed | None) -> ActionChunk:
        """The chunk. The connection that has waited longest since its last answer is first."""
        assert request.observation is not None
        job = self._queue.submit(request.observation, request.prefix, self._answered_s)
        waiting = asyncio.ensure_future(asyncio.wrap_future(job))
        gone = asyncio.ensure_future((closed or asyncio.Event().wait)())
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ConnectionGone
            if waiting.cancelled():
                raise BusyError("the server ends")
            return waiting.result()
        finally:
            gone.cancel()
            waiting.cancel()


def expected_of(policy: Policy, prompt: str = "") -> Expected:
    """What requests must have for a policy; `prompt` is for those without one."""
    return Expected(
        tuple(policy.cameras), policy.state_dim, policy.horizon, policy.action_dim, prompt
    )


def metadata(policy: Policy, robot: str) -> dict[str, Any]:
    """What a connection is told first; clients of openpi ignore unknown keys."""
    return {
        "server": "pi05_ros",
        "policy": policy.description,
        "robot": robot,
        "cameras": list(policy.cameras),
        "state_dim": policy.state_dim,
        "action_dim": policy.action_dim,
        "action_horizon": policy.horizon,
        "dt_s": policy.dt_s,
        "capabilities": {
            "prev_actions": bool(getattr(policy, "continues_prefixes", False)),
            "reset": True,
        },
    }


def metrics(statistics: Statistics, queue: DeviceQueue) -> str:
    """In Prometheus's text format."""
    done = queue.statistics
    latencies = list(statistics.latencies_s) or [0.0]
    values = {
        "connections_total": ("counter", statistics.connections),
        "connections_open": ("gauge", statistics.open),
        "requests_total": ("counter", statistics.requests),
        "errors_total": ("counter", statistics.errors),
        "refused_total": ("counter", done.refused),
        "chunks_total": ("counter", done.completed),
        "inferences_total": ("counter", done.batches),
        "waiting": ("gauge", queue.waiting),
        "device_busy_seconds_total": ("counter", done.busy_s),
        "received_bytes_total": ("counter", statistics.received_bytes),
        "sent_bytes_total": ("counter", statistics.sent_bytes),
        "latency_p50_seconds": ("gauge", float(np.percentile(latencies, 50))),
        "latency_p99_seconds": ("gauge", float(np.percentile(latencies, 99))),
    }
    lines = []
    for name, (kind, value) in values.items():
        lines += [f"# TYPE pi05_{name} {kind}", f"pi05_{name} {value}"]
    return "\n".join(lines) + "\n"
