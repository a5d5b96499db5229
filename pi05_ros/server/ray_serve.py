"""One address for several GPUs: Ray Serve runs a replica of the policy on each.

    serve run pi05_ros.server.ray_serve:app checkpoint=CHECKPOINT robot=aloha replicas=4 gpus=1

A robot's connection stays on its replica. Replicas are checked, replaced and scaled by Ray; the
requests of one are served as by `pi05 serve`. Needs the extra `ray`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray import serve

from pi05_ros.adapters.remote import API_KEY
from pi05_ros.protocol import pack
from pi05_ros.server.device_queue import DeviceQueue
from pi05_ros.server.dialects import Dialect
from pi05_ros.server.session import Session, Statistics, expected_of, metadata, metrics

INTERNAL_ERROR, POLICY_VIOLATION = 1011, 1008
OPTIONS = {
    "checkpoint": "small", "robot": "aloha", "device": "auto", "prompt": "", "threads": "",
    "replicas": "1", "max_replicas": "", "gpus": "0", "cpus": "1", "max_batch": "1",
    "robots_per_replica": "16",
}  # fmt: skip
"""Arguments of `app` and their defaults. With `max_replicas`, Ray adds replicas while each has more
than `robots_per_replica` connections."""
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def _answer(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    replica: Any = serve.get_replica_context().servable_object
    if scope["type"] == "http":
        await replica.answer_http(scope, send)
    elif scope["type"] == "websocket":
        await replica.serve_robot(scope, receive, send)


def web() -> Callable[..., Awaitable[None]]:
    """The ASGI application of a replica, which Ray makes there."""
    return _answer


@serve.deployment(health_check_period_s=5.0, health_check_timeout_s=10.0)
@serve.ingress(web)
class PolicyReplica:
    """A policy on one device, and its connections."""

    def __init__(self, options: Mapping[str, str]) -> None:
        from pi05_ros.adapters.factory import open_policy

        threads = int(options["threads"]) if options["threads"] else None
        self._lost = ""
        self._queue = DeviceQueue(
            lambda: open_policy(
                options["checkpoint"], options["robot"], device=options["device"], threads=threads
            ),
            int(options["max_batch"]),
            on_lost=self._set_lost,
        )
        self._queue.start()
        policy = self._queue.wait_ready()
        self._expected = expected_of(policy, options["prompt"])
        self._metadata = metadata(policy, options["robot"]) | {"process": os.getpid()}
        self._statistics = Statistics()
        self._api_key = os.environ.get(API_KEY, "")

    def check_health(self) -> None:
        """Ray replaces a replica whose device is lost."""
        if self._lost:
            raise RuntimeError(f"the device is lost: {self._lost}")

    async def answer_http(self, scope: Mapping[str, Any], send: Send) -> None:
        """`/healthz`, and `/metrics` of this replica."""
        bodies = {
            "/healthz": lambda: "OK\n",
            "/metrics": lambda: metrics(self._statistics, self._queue),
        }
        body = bodies.get(scope["path"])
        status = 404 if body is None else 200
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body().encode() if body else b""})

    async def serve_robot(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """The requests of one robot."""
        await receive()
        dialect = Dialect.of(scope["path"])
        given = dict(scope["headers"]).get(b"authorization", b"")
        if dialect is None or (self._api_key and given != f"Api-Key {self._api_key}".encode()):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        await send({"type": "websocket.accept"})
        self._statistics.connections += 1
        self._statistics.open += 1
        try:
            await send({"type": "websocket.send", "bytes": pack(self._metadata)})
            session = Session(self._queue, self._expected, dialect, self._statistics)
            while (message := await receive())["type"] == "websocket.receive":
                data = message.get("bytes")
                reply = await session.answer(message.get("text") or "" if data is None else data)
                kind = "text" if isinstance(reply.data, str) else "bytes"
                await send({"type": "websocket.send", kind: reply.data})
                if reply.ends:
                    await send({"type": "websocket.close", "code": INTERNAL_ERROR})
                    break
        finally:
            self._statistics.open -= 1

    def _set_lost(self, reason: str) -> None:
        self._lost = reason


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of `serve run`; `arguments` are of `OPTIONS`.

    Raises:
        ValueError: an unknown argument.
    """
    unknown = sorted(set(arguments) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | {key: str(value) for key, value in arguments.items()}
    actor = {"num_gpus": float(options["gpus"]), "num_cpus": float(options["cpus"])}
    scaling: dict[str, Any] = {"num_replicas": int(options["replicas"])}
    per_replica = int(options["robots_per_replica"])
    if options["max_replicas"]:
        scaling = {
            "autoscaling_config": {
                "min_replicas": int(options["replicas"]),
                "max_replicas": int(options["max_replicas"]),
                "target_ongoing_requests": per_replica,
            }
        }
    deployment = PolicyReplica.options(  # type: ignore[attr-defined]
        ray_actor_options=actor, max_ongoing_requests=4 * per_replica, **scaling
    )
    bound: serve.Application = deployment.bind(options)
    return bound
