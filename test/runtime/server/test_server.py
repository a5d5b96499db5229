"""The server through real sockets on loopback, with a policy that does nothing.

Faults: one slow request that stops all others, a queue that grows without end, a robot that gets
another robot's chunk, a connection that dies with a request, a server open to the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pi05_ros.protocol import pack, unpack
from pi05_ros.server.device_queue import BusyError, DeviceQueue, InferenceError
from pi05_ros.server.server import PolicyServer, ServeError, ServerSettings
from pi05_ros.types import ActionChunk, ActionPrefix, Observation

TIMEOUT_S = 10.0


class EchoPolicy:
    """A chunk of the state's first value; waits for `gate` where it has one."""

    horizon, dt_s, state_dim, action_dim = 5, 0.1, 2, 2
    cameras, description = ("high",), "an echo"

    def __init__(self) -> None:
        self.gate: threading.Event | None = None
        self.prefixes: list[ActionPrefix | None] = []
        self.seen: list[float] = []
        self.fail = False

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self.seen.append(float(observation.state[0]))
        self.prefixes.append(prefix)
        if self.gate is not None:
            self.gate.wait(TIMEOUT_S)
        if self.fail:
            raise RuntimeError("out of luck")
        actions = np.full((self.horizon, self.action_dim), observation.state[0])
        return ActionChunk(actions, observation.stamp_s, self.dt_s, observation.instruction)


class BatchPolicy(EchoPolicy):
    """Takes several observations at once."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def infer_batch(self, observations: list[Observation]) -> list[ActionChunk]:
        self.batches.append(len(observations))
        return [EchoPolicy.infer(self, each) for each in observations]


def request(value: float, **more: Any) -> bytes:
    image = np.zeros((4, 4, 3), np.uint8)
    return pack({"images": {"high": image}, "state": np.array([value, 0.0]), **more})


@pytest.fixture
def policy() -> EchoPolicy:
    return EchoPolicy()


@pytest.fixture
def queue(policy: EchoPolicy) -> Iterator[DeviceQueue]:
    made = DeviceQueue(lambda: policy, max_waiting=3)
    made.start()
    made.wait_ready(TIMEOUT_S)
    yield made
    if policy.gate is not None:
        policy.gate.set()
    made.stop()


@contextlib.asynccontextmanager
async def serving(queue: DeviceQueue, **settings: Any) -> AsyncIterator[PolicyServer]:
    made = PolicyServer(queue, queue.wait_ready(), ServerSettings(port=0, **settings), "aloha")
    async with made.listening():
        yield made


@contextlib.asynccontextmanager
async def client(
    server: PolicyServer, path: str = "/", **options: Any
) -> AsyncIterator[ClientConnection]:
    """A connection that has read the metadata."""
    uri = f"ws://127.0.0.1:{server.port}{path}"
    async with connect(uri, compression=None, proxy=None, **options) as connection:
        assert unpack(await received(connection))["action_horizon"] == 5
        yield connection


async def received(connection: ClientConnection) -> bytes:
    data = await asyncio.wait_for(connection.recv(), TIMEOUT_S)
    assert isinstance(data, bytes)
    return data


async def asked(connection: ClientConnection, data: bytes) -> Any:
    await connection.send(data)
    return unpack(await received(connection))


async def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        await asyncio.sleep(0.005)


def test_a_chunk_for_an_observation(queue: DeviceQueue) -> None:
    async def run() -> None:
        async with serving(queue) as server, client(server) as connection:
            first = await asked(connection, request(3.0))
            assert first["actions"].shape == (5, 2) and (first["actions"] == 3.0).all()
            assert "prev_total_ms" not in first["server_timing"]
            second = await asked(connection, request(4.0))
            assert (second["actions"] == 4.0).all()
            assert second["server_timing"]["prev_total_ms"] > 0
            assert await asked(connection, pack({"endpoint": "reset"})) == {
                "status": "reset successful"
            }

    asyncio.run(run())


def test_a_prefix_reaches_the_policy(queue: DeviceQueue, policy: EchoPolicy) -> None:
    async def run() -> None:
        async with serving(queue) as server, client(server) as connection:
            more = {"prev_actions": np.ones((3, 2)), "inference_delay": 2}
            await asked(connection, request(1.0, **more))

    asyncio.run(run())
    (prefix,) = policy.prefixes
    assert prefix is not None and prefix.committed_steps == 2 and prefix.actions.shape == (3, 2)


def test_each_robot_gets_its_own_chunk_and_an_equal_share(
    queue: DeviceQueue, policy: EchoPolicy
) -> None:
    async def robot(server: PolicyServer, number: int) -> None:
        async with client(server) as connection:
            for _ in range(10):
                found = await asked(connection, request(float(number)))
                assert (found["actions"] == number).all()

    async def run() -> None:
        async with serving(queue) as server:
            await asyncio.gather(*(robot(server, number) for number in range(3)))

    asyncio.run(run())
    counts = [policy.seen[:15].count(float(number)) for number in range(3)]
    assert min(counts) >= 3, counts


def test_a_busy_device_stops_neither_health_nor_pings(
    queue: DeviceQueue, policy: EchoPolicy
) -> None:
    """Fault: openpi's handler runs the policy in the event loop."""
    policy.gate = threading.Event()

    async def run() -> None:
        async with serving(queue) as server, client(server) as connection:
            await connection.send(request(1.0))
            await until(lambda: policy.seen)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in await asyncio.wait_for(reader.readline(), TIMEOUT_S)
            writer.close()
            await asyncio.wait_for(await connection.ping(), TIMEOUT_S)
            assert policy.gate is not None
            policy.gate.set()
            assert unpack(await received(connection))["actions"][0, 0] == 1.0

    asyncio.run(run())


def test_requests_beyond_the_limit_are_refused_and_the_connection_stays(
    queue: DeviceQueue, policy: EchoPolicy
) -> None:
    gate = policy.gate = threading.Event()

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(serving(queue))
            many = [await stack.enter_async_context(client(server)) for _ in range(5)]
            await many[0].send(request(0.0))
            await until(lambda: policy.seen)
            for connection in many[1:4]:
                await connection.send(request(1.0))
            await until(lambda: queue.waiting == 3)
            await many[4].send(request(4.0))
            refused = await asyncio.wait_for(many[4].recv(), TIMEOUT_S)
            assert refused == "busy: 3 requests wait; try again later"
            gate.set()
            await until(lambda: queue.waiting == 0)
            assert (await asked(many[4], request(5.0)))["actions"][0, 0] == 5.0

    asyncio.run(run())
    assert queue.statistics.refused == 1


def test_a_request_of_a_dead_connection_is_dropped(queue: DeviceQueue, policy: EchoPolicy) -> None:
    gate = policy.gate = threading.Event()

    async def run() -> None:
        async with serving(queue) as server, client(server) as alive:
            await alive.send(request(1.0))
            await until(lambda: policy.seen)
            async with client(server) as dead:
                await dead.send(request(2.0))
                await until(lambda: queue.waiting == 1)
            await until(lambda: server.statistics.open == 1)
            gate.set()
            await received(alive)
            assert (await asked(alive, request(3.0)))["actions"][0, 0] == 3.0

    asyncio.run(run())
    assert policy.seen == [1.0, 3.0] and queue.statistics.cancelled == 1


@pytest.mark.parametrize(
    ("path", "ends"), [("/", True), ("/openpi/policy", True), ("/v1/realtime/robot/openpi", False)]
)
def test_errors_in_each_dialect(
    queue: DeviceQueue, policy: EchoPolicy, path: str, ends: bool
) -> None:
    """One line; openpi's text frame and code 1011, binary elsewhere; vllm-omni's stays open."""

    async def run(data: bytes | str, words: str) -> None:
        async with serving(queue) as server, client(server, path) as connection:
            await connection.send(data)
            frame = await asyncio.wait_for(connection.recv(), TIMEOUT_S)
            text = frame if isinstance(frame, str) else str(unpack(frame))
            assert isinstance(frame, str) is (path == "/")
            assert words in text and "\n" not in text and "Traceback" not in text
            if not ends:
                await connection.send(request(1.0))
                assert await received(connection)
                return
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(connection.recv(), TIMEOUT_S)
            assert connection.close_code == 1011

    asyncio.run(run(b"\xc1", "not msgpack"))
    asyncio.run(run("text", "must be a binary frame"))
    asyncio.run(run(pack({"state": [1]}), "no image"))


def test_a_policy_that_raises_ends_one_connection_alone(
    queue: DeviceQueue, policy: EchoPolicy
) -> None:
    async def run() -> None:
        async with serving(queue) as server, client(server) as one, client(server) as other:
            policy.fail = True
            await one.send(request(1.0))
            assert "RuntimeError: out of luck" in str(await one.recv())
            policy.fail = False
            assert (await asked(other, request(2.0)))["actions"][0, 0] == 2.0

    asyncio.run(run())


def test_a_message_that_is_too_large_is_refused_before_it_is_read(queue: DeviceQueue) -> None:
    async def run() -> None:
        async with serving(queue, max_message_bytes=2000) as server:
            async with client(server) as connection:
                with contextlib.suppress(ConnectionClosed):
                    await connection.send(bytes(100_000))
                    await received(connection)
                await connection.wait_closed()
                assert connection.close_code == 1009
            async with client(server) as connection:
                await asked(connection, request(1.0))

    asyncio.run(run())


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        UPGRADE,
        UPGRADE + b"\x82\xfe",  # a frame that is cut in its length
        UPGRADE + b"\x82\xff" + (2**62).to_bytes(8, "big") + bytes(4),  # of 4 exabytes
        UPGRADE + b"\x82\x05hello",  # without a mask
        UPGRADE + b"\xf2\x80" + bytes(4),  # reserved bits
    ],
)
def test_silent_and_malformed_sockets_cost_no_other_robot_anything(
    queue: DeviceQueue, data: bytes
) -> None:
    async def run() -> None:
        async with serving(queue) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(data)
            await writer.drain()
            async with client(server) as connection:
                for value in (1.0, 2.0):
                    found = await asked(connection, request(value))
                    assert found["actions"][0, 0] == value
            writer.close()

    asyncio.run(run())


def test_a_client_that_reads_nothing_costs_no_other_robot_anything(queue: DeviceQueue) -> None:
    """Its answers fill its own socket alone."""

    async def run() -> None:
        async with serving(queue) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            body = request(9.0)
            frame = b"\x82\xfe" + len(body).to_bytes(2, "big") + bytes(4) + body
            assert 125 < len(body) < 2**16
            writer.write(UPGRADE + 200 * frame)
            await writer.drain()
            async with client(server) as connection:
                for value in (1.0, 2.0, 3.0):
                    found = await asked(connection, request(value))
                    assert found["actions"][0, 0] == value
            writer.close()

    asyncio.run(run())


def test_an_idle_connection_is_closed(queue: DeviceQueue) -> None:
    async def run() -> None:
        async with serving(queue, idle_timeout_s=0.05) as server, client(server) as connection:
            await asyncio.wait_for(connection.wait_closed(), TIMEOUT_S)

    asyncio.run(run())


def test_a_key_is_needed_beyond_this_machine(queue: DeviceQueue, policy: EchoPolicy) -> None:
    with pytest.raises(ServeError, match=r"--host 0\.0\.0\.0 is reachable .* set --api-key"):
        PolicyServer(queue, policy, ServerSettings(host="0.0.0.0"))
    with pytest.raises(ServeError, match="belong together"):
        PolicyServer(queue, policy, ServerSettings(certificate="a.pem"))

    async def run() -> None:
        async with serving(queue, api_key="secret") as server:
            for headers in ({}, {"Authorization": "Api-Key wrong"}):
                with pytest.raises(InvalidStatus) as refused:
                    async with client(server, additional_headers=headers):
                        pass
                assert refused.value.response.status_code == 401
            key = {"Authorization": "Api-Key secret"}
            async with client(server, additional_headers=key) as connection:
                await asked(connection, request(1.0))

    asyncio.run(run())


def test_unknown_paths_and_too_many_connections_are_refused(queue: DeviceQueue) -> None:
    async def run() -> None:
        async with serving(queue, max_connections=1) as server:
            with pytest.raises(InvalidStatus) as refused:
                async with client(server, "/admin"):
                    pass
            assert refused.value.response.status_code == 404
            async with client(server):
                with pytest.raises(InvalidStatus) as refused:
                    async with client(server):
                        pass
                assert refused.value.response.status_code == 503

    asyncio.run(run())


def test_a_taken_port_is_named(queue: DeviceQueue) -> None:
    async def run() -> None:
        async with serving(queue) as server:
            with pytest.raises(ServeError, match=f"127.0.0.1:{server.port}"):
                settings = ServerSettings(port=server.port)
                async with PolicyServer(queue, queue.wait_ready(), settings).listening():
                    pass

    asyncio.run(run())


def test_waiting_requests_are_inferred_together() -> None:
    policy = BatchPolicy()
    gate = policy.gate = threading.Event()
    queue = DeviceQueue(lambda: policy, max_batch=4)
    queue.start()
    queue.wait_ready(TIMEOUT_S)
    image = {"high": np.zeros((4, 4, 3), np.uint8)}

    def submit(value: float, prefix: ActionPrefix | None = None) -> Any:
        return queue.submit(Observation(image, np.array([value, 0.0]), "", value), prefix, value)

    first = submit(0.0)
    while not policy.seen:
        time.sleep(0.001)
    prefix = ActionPrefix(np.zeros((1, 2)), 1)
    rest = [submit(5.0), submit(1.0), submit(3.0, prefix), submit(2.0), submit(4.0)]
    gate.set()
    for future, value in zip([first, *rest], (0, 5, 1, 3, 2, 4), strict=True):
        assert future.result(TIMEOUT_S).actions[0, 0] == value
    assert policy.seen == [0, 1, 2, 3, 4, 5], "the earliest deadline first"
    assert policy.batches == [2, 2], "one with a prefix is inferred alone"
    assert queue.stop()
    with pytest.raises(BusyError, match="the server ends"):
        submit(1.0)


def test_one_bad_observation_of_a_batch_costs_no_other_its_chunk() -> None:
    """Fault: an instruction without room for the state stops all robots that waited with it."""

    class Picky(BatchPolicy):
        def infer(self, observation: Observation, prefix: Any = None) -> ActionChunk:
            if observation.state[0] == 2:
                raise ValueError("too long")
            return super().infer(observation, prefix)

        def infer_batch(self, observations: list[Observation]) -> list[ActionChunk]:
            return [self.infer(each) for each in observations]

    policy = Picky()
    gate = policy.gate = threading.Event()
    queue = DeviceQueue(lambda: policy, max_batch=4)
    queue.start()
    queue.wait_ready(TIMEOUT_S)
    image = {"high": np.zeros((4, 4, 3), np.uint8)}
    futures = [
        queue.submit(Observation(image, np.array([k, 0.0]), "", k), None, k) for k in (0.0, 1, 2, 3)
    ]
    gate.set()
    for k in (0, 1, 3):
        assert futures[k].result(TIMEOUT_S).actions[0, 0] == k
    with pytest.raises(InferenceError, match="ValueError: too long"):
        futures[2].result(TIMEOUT_S)
    assert (queue.statistics.completed, queue.statistics.failed) == (3, 1)
    assert queue.stop()


def test_a_lost_device_is_told_once_and_a_policy_with_a_history_is_refused(
    policy: EchoPolicy, queue: DeviceQueue
) -> None:
    lost: list[str] = []

    class Broken(EchoPolicy):
        def infer(self, observation: Observation, prefix: Any = None) -> ActionChunk:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = DeviceQueue(Broken, on_lost=lost.append)
    broken.start()
    image = {"high": np.zeros((4, 4, 3), np.uint8)}
    future = broken.submit(Observation(image, np.zeros(2), "", 0.0), None, 0.0)
    with pytest.raises(InferenceError, match="illegal memory access"):
        future.result(TIMEOUT_S)
    assert len(lost) == 1 and broken.stop()
    policy.history_steps = 1  # type: ignore[attr-defined]
    with pytest.raises(ServeError, match="needs earlier observations"):
        PolicyServer(queue, policy, ServerSettings())


def test_a_policy_that_cannot_be_loaded_is_the_callers_error() -> None:
    def load() -> EchoPolicy:
        raise ValueError("no such checkpoint")

    queue = DeviceQueue(load)
    queue.start()
    with pytest.raises(ValueError, match="no such checkpoint"):
        queue.wait_ready(TIMEOUT_S)
    assert queue.stop()


def test_metrics_are_prometheus(queue: DeviceQueue) -> None:
    async def run() -> str:
        async with serving(queue) as server, client(server) as connection:
            await asked(connection, request(1.0))
            return server.metrics()

    text = asyncio.run(run())
    assert "# TYPE pi05_requests_total counter\npi05_requests_total 1\n" in text
    assert "pi05_connections_open 1" in text and "pi05_latency_p99_seconds 0." in text
