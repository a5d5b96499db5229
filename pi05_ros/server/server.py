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
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from pi05_ros.protocol import pack
from pi05_ros.server.device_queue import DeviceQueue
from pi05_ros.server.dialects import Dialect
from pi05_ros.server.session import (
    ConnectionGone,
    Session,
    Statistics,
    expected_of,
    metadata,
    metrics,
)
from pi05_ros.types import Policy

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
        self._expected = expected_of(policy, settings.prompt)
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
            session = Session(self._queue, self._expected, dialect, self.statistics)
            await self._answer_requests(connection, session)
        except (ConnectionClosed, ConnectionGone):
            pass
        except asyncio.TimeoutError:  # another class before Python 3.11
            logger.info("%s is idle: closed", connection.remote_address)
        finally:
            self.statistics.open -= 1

    async def _answer_requests(self, connection: ServerConnection, session: Session) -> None:
        while True:
            data = await asyncio.wait_for(connection.recv(), self.settings.idle_timeout_s)
            reply = await session.answer(data, connection.wait_closed)
            await connection.send(reply.data)
            if reply.ends:
                await connection.close(INTERNAL_ERROR, "error in previous frame")
                return

    def metrics(self) -> str:
        """In Prometheus's text format."""
        return metrics(self.statistics, self._queue)


def _plain(status: http.HTTPStatus, text: str, kind: str = "text/plain; charset=utf-8") -> Response:
    body = text.encode()
    headers: Mapping[str, str] = {"Content-Type": kind, "Content-Length": str(len(body))}
    return Response(status.value, status.phrase, Headers(headers), body)
