"""`pi05 serve`: a policy behind openpi's websocket, for many robots.

The event loop receives and sends; `DeviceQueue` infers on a thread of its own. Sources: openpi
`serving/websocket_policy_server.py`; RFC 6455.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from pi05_ros.protocol import ProtocolError, pack, unpack
from pi05_ros.server.device_queue import BusyError, DeviceQueue, InferenceError
from pi05_ros.server.dialects import (
    Dialect,
    Expected,
    Request,
    answer,
    failure,
    read_request,
)
from pi05_ros.types import ActionChunk, Policy

LOOPBACK = ("127.0.0.1", "::1", "localhost")
INTERNAL_ERROR = 1011
logger = logging.getLogger(__name__)


class ServeError(RuntimeError):
    """The server cannot start; one line says what to do."""


@dataclass(frozen=True)
class ServerSettings:
    """How connections are accepted and limited."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    """Clients send `Authorization: Api-Key KEY`; empty accepts everybody."""
    certificate: str = ""
    """PEM files of TLS."""
    key: str = ""
    max_message_bytes: int = 64 * 2**20
    """Four 1080p images are 25 MB."""
    max_connections: int = 256
    idle_timeout_s: float = 600.0
    """A connection without a request is closed."""
    prompt: str = ""
    """For requests without one."""

    def check(self) -> None:
        """Raise ServeError for settings that would expose the robot."""
        if self.host not in LOOPBACK and not self.api_key:
            raise ServeError(
                f"--host {self.host} is reachable from other machines: set --api-key, and "
                "--certificate and --key for TLS"
            )
        if bool(self.certificate) != bool(self.key):
            raise ServeError("--certificate and --key belong together")


@dataclass
class Statistics:
    """Of all connections since the start."""

    connections: int = 0
    open: int = 0
    requests: int = 0
    errors: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    latencies_s: list[float] = field(default_factory=list)
    """The last requests', from the message to its answer."""


class PolicyServer:
    """Serves the policy of a started queue while in `listening`.

    Raises:
        ServeError: settings that would expose the robot, or a policy that needs a history, which
            no client of the protocol sends.
    """

    def __init__(
        self, queue: DeviceQueue, policy: Policy, settings: ServerSettings, robot: str = ""
    ) -> None:
        settings.check()
        if getattr(policy, "history_steps", 0):
            raise ServeError(
                f"{policy.description} needs earlier observations, which openpi's protocol does "
                "not have: run it in the robot's node"
            )
        self._queue, self.settings = queue, settings
        self.statistics = Statistics()
        self._expected = Expected(
            tuple(policy.cameras),
            policy.state_dim,
            policy.horizon,
            policy.action_dim,
            settings.prompt,
            dict(getattr(policy, "camera_aliases", {})),
        )
        self.metadata = metadata(policy, robot)
        self._server: Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        return int(next(iter(self._server.sockets)).getsockname()[1])

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[PolicyServer]:
        """Accept connections inside the context.

        Raises:
            ServeError: the port is taken, or the certificate cannot be read.
        """
        settings = self.settings
        try:
            context = None
            if settings.certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(settings.certificate, settings.key)
            self._server = await serve(
                self._serve,
                settings.host,
                settings.port,
                ssl=context,
                compression=None,
                max_size=settings.max_message_bytes,
                max_queue=2,
                process_request=self._process_http,
                ping_interval=20,
                ping_timeout=20,
                server_header=None,
            )
        except (OSError, ssl.SSLError) as error:
            raise ServeError(f"{settings.host}:{settings.port}: {error}") from None
        try:
            yield self
        finally:
            self._server.close()
            await self._server.wait_closed()

    def _process_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer plain HTTP requests; check the key and the path of the others."""
        if request.path == "/healthz":
            return _plain(http.HTTPStatus.OK, "OK\n")
        if request.path == "/metrics":
            return _plain(http.HTTPStatus.OK, self.metrics())
        if request.path == "/v1/actions/metadata":
            return _plain(http.HTTPStatus.OK, json.dumps(self.metadata), "application/json")
        if self.settings.api_key:
            given = request.headers.get("Authorization", "")
            wanted = f"Api-Key {self.settings.api_key}"
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                return _plain(http.HTTPStatus.UNAUTHORIZED, "wrong or missing Api-Key\n")
        if Dialect.of(request.path) is None:
            return _plain(http.HTTPStatus.NOT_FOUND, f"no policy at {request.path[:200]}\n")
        if self.statistics.open >= self.settings.max_connections:
            return _plain(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        request = connection.request
        dialect = Dialect.of(request.path if request else "/") or Dialect.OPENPI
        self.statistics.connections += 1
        self.statistics.open += 1
        try:
            await connection.send(pack(self.metadata))
            await self._answer_requests(connection, dialect)
        except ConnectionClosed:
            pass
        except asyncio.TimeoutError:  # another class before Python 3.11
            logger.info("%s is idle: closed", connection.remote_address)
        finally:
            self.statistics.open -= 1

    async def _answer_requests(self, connection: ServerConnection, dialect: Dialect) -> None:
        answered_s = time.monotonic()
        previous_s = 0.0
        while True:
            data = await asyncio.wait_for(connection.recv(), self.settings.idle_timeout_s)
            started_s = time.monotonic()
            self.statistics.requests += 1
            self.statistics.received_bytes += len(data)
            try:
                request = self._read(data)
                message: Any = {"status": "reset successful"}
                if request.observation is not None:
                    chunk = await self._infer(connection, request, answered_s)
                    times_s = {"infer_ms": time.monotonic() - started_s}
                    if previous_s:
                        times_s["prev_total_ms"] = previous_s
                    message = answer(chunk, dialect, times_s)
            except (ProtocolError, BusyError, InferenceError) as error:
                self.statistics.errors += 1
                found = failure(str(error), dialect)
                await connection.send(found if isinstance(found, str) else pack(found))
                if dialect is not Dialect.VLLM and not isinstance(error, BusyError):
                    await connection.close(INTERNAL_ERROR, "error in previous frame")
                    return
                continue
            packed = pack(message)
            self.statistics.sent_bytes += len(packed)
            await connection.send(packed)
            answered_s = time.monotonic()
            previous_s = answered_s - started_s
            self._record(previous_s)

    def _read(self, data: str | bytes) -> Request:
        if isinstance(data, str):
            raise ProtocolError("a request must be a binary frame, got text")
        return read_request(unpack(data), self._expected, time.time())

    async def _infer(
        self, connection: ServerConnection, request: Request, since_s: float
    ) -> ActionChunk:
        """The chunk; a request of a connection that ends meanwhile is dropped.

        Who has waited longest since its last answer, `since_s`, is served first.
        """
        assert request.observation is not None
        job = self._queue.submit(request.observation, request.prefix, since_s)
        waiting = asyncio.ensure_future(asyncio.wrap_future(job))
        closed = asyncio.ensure_future(connection.wait_closed())
        try:
            await asyncio.wait((waiting, closed), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ConnectionClosedError(None, None)
            if waiting.cancelled():
                raise BusyError("the server ends")
            return waiting.result()
        finally:
            closed.cancel()
            waiting.cancel()

    def _record(self, seconds: float) -> None:
        self.statistics.latencies_s.append(seconds)
        del self.statistics.latencies_s[:-1000]

    def metrics(self) -> str:
        """In Prometheus's text format."""
        statistics, queue = self.statistics, self._queue.statistics
        latencies = statistics.latencies_s or [0.0]
        values = {
            "connections_total": ("counter", statistics.connections),
            "connections_open": ("gauge", statistics.open),
            "requests_total": ("counter", statistics.requests),
            "errors_total": ("counter", statistics.errors),
            "refused_total": ("counter", queue.refused),
            "chunks_total": ("counter", queue.completed),
            "inferences_total": ("counter", queue.batches),
            "waiting": ("gauge", self._queue.waiting),
            "device_busy_seconds_total": ("counter", queue.busy_s),
            "received_bytes_total": ("counter", statistics.received_bytes),
            "sent_bytes_total": ("counter", statistics.sent_bytes),
            "latency_p50_seconds": ("gauge", float(np.percentile(latencies, 50))),
            "latency_p99_seconds": ("gauge", float(np.percentile(latencies, 99))),
        }
        lines = []
        for name, (kind, value) in values.items():
            lines += [f"# TYPE pi05_{name} {kind}", f"pi05_{name} {value}"]
        return "\n".join(lines) + "\n"


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


def _plain(status: http.HTTPStatus, text: str, kind: str = "text/plain; charset=utf-8") -> Response:
    body = text.encode()
    headers: Mapping[str, str] = {"Content-Type": kind, "Content-Length": str(len(body))}
    return Response(status.value, status.phrase, Headers(headers), body)
