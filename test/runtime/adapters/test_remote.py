"""The client of a policy server; faults: a late answer taken for the next one, a wait without end,
another robot's server, a robot that moves after its server is gone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from pi05_ros.adapters.factory import open_policy
from pi05_ros.adapters.remote import RemoteError, RemotePolicy, is_address
from pi05_ros.check import check
from pi05_ros.executor import check_chunk
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.protocol import pack, unpack
from pi05_ros.server.device_queue import DeviceQueue
from pi05_ros.server.server import PolicyServer, ServerSettings
from pi05_ros.types import ActionChunk, ActionPrefix, Observation

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


class Steady:
    """Predicts the state, and remembers what it was given."""

    horizon, dt_s, state_dim, action_dim = 20, 0.02, 14, 14
    cameras, description = CAMERAS, "steady"
    continues_prefixes = True

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self.prefixes: list[ActionPrefix | None] = []

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self.seen.append(observation)
        self.prefixes.append(prefix)
        actions = np.tile(observation.state, (self.horizon, 1))
        timings_s = {"vision": 0.002}
        return ActionChunk(actions, observation.stamp_s, self.dt_s, timings_s=timings_s)


@contextmanager
def own_server(policy: Steady, robot: str = "aloha", **settings: Any) -> Iterator[PolicyServer]:
    """This package's server on a thread of its own."""
    queue = DeviceQueue(lambda: policy)
    queue.start()
    options = ServerSettings(**({"port": 0} | settings))
    server = PolicyServer(queue, queue.wait_ready(10.0), options, robot)
    loop = asyncio.new_event_loop()
    ready, end = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with server.listening():
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(10.0)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()
        queue.stop()


@contextmanager
def other_server(
    answer: Callable[[ServerConnection, Any], None], metadata: Any = None
) -> Iterator[str]:
    """A server in other words: `answer(connection, request)`. Yields its address."""

    def handle(connection: ServerConnection) -> None:
        connection.send(pack({} if metadata is None else metadata))
        for data in connection:
            assert isinstance(data, bytes)
            answer(connection, unpack(data))

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def address(server: PolicyServer) -> str:
    return f"ws://127.0.0.1:{server.port}"


def observe(value: float = 0.25) -> Observation:
    images = {name: np.full((6, 8, 3), k, np.uint8) for k, name in enumerate(CAMERAS)}
    return Observation(images, np.full(14, value), "wave", 12.5)


def test_a_chunk_through_a_server_is_the_policys() -> None:
    policy = Steady()
    with own_server(policy) as server:
        remote = open_policy(address(server))
        assert isinstance(remote, RemotePolicy)
        assert (remote.horizon, remote.dt_s, remote.cameras) == (20, 0.02, CAMERAS)
        assert remote.description == f"steady at {address(server)}"
        observation = observe()
        chunk = remote.infer(observation)
        check_chunk(chunk, remote, observation)
        np.testing.assert_allclose(chunk.actions, 0.25)
        assert (chunk.stamp_s, chunk.instruction) == (12.5, "wave")
        assert set(chunk.timings_s) == {"wire", "server", "policy"}
        assert chunk.timings_s["policy"] == pytest.approx(0.002)
        seen = policy.seen[-1]
        assert seen.instruction == "wave" and seen.images["cam_left_wrist"][0, 0, 0] == 1
        remote.close()


def test_check_asks_the_server() -> None:
    with own_server(Steady()) as server:
        report = check(address(server))
    assert report.runs and report.kind == "server" and report.folder is not None
    assert (report.horizon, report.dt_s, report.action_dim) == (20, 0.02, 14)
    assert "steady at ws://" in report.folder
    gone = check("ws://127.0.0.1:1")
    assert not gone.runs and "no policy server at" in gone.problems[0]


def test_a_prefix_is_sent_to_a_server_that_continues_it() -> None:
    policy = Steady()
    with own_server(policy) as server:
        remote = RemotePolicy(address(server))
        remote.infer(observe(), ActionPrefix(np.ones((5, 14)), 2))
        prefix = policy.prefixes[-1]
        assert (
            prefix is not None and prefix.committed_steps == 2 and prefix.actions.shape == (5, 14)
        )
        remote.close()

    def answer(connection: ServerConnection, request: Any) -> None:
        connection.send(pack({"actions": np.zeros((10, 14), np.float32)}))

    with other_server(answer) as other:
        remote = RemotePolicy(other)
        with pytest.raises(ValueError, match="does not continue a prefix: use another scheduler"):
            remote.infer(observe(), ActionPrefix(np.ones((5, 14)), 2))
        remote.close()


def test_droids_keys_are_openpis() -> None:
    seen: list[Any] = []

    def answer(connection: ServerConnection, request: Any) -> None:
        seen.append(request)
        connection.send(pack({"actions": np.zeros((15, 8)), "server_timing": {"infer_ms": 5}}))

    with other_server(answer) as other:
        remote = RemotePolicy(other, "droid")
        images = {name: np.zeros((4, 4, 3), np.uint8) for name in remote.cameras}
        chunk = remote.infer(Observation(images, np.arange(8.0), "open", 1.0))
        remote.close()
    assert set(seen[-1]) == {
        "observation/exterior_image_1_left", "observation/wrist_image_left",
        "observation/joint_position", "observation/gripper_position", "prompt",
    }  # fmt: skip
    assert seen[-1]["observation/gripper_position"].tolist() == [7.0]
    assert chunk.timings_s["server"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pack(np.zeros((10, 14), np.float32)), None),
        ("Traceback (most recent call last):\n  File x\nValueError: bad state\n", "bad state"),
        (pack({"error": "no GPU"}), "no GPU"),
        (pack({"type": "error", "message": "busy"}), "busy"),
        (pack({"actions": np.zeros(14)}), r"actions of shape \[14\], must be \[steps, 14\]"),
        (pack({"actions": "none"}), "actions of shape"),
        (b"\xc1", "not msgpack"),
    ],
)
def test_other_servers_answers(frame: bytes | str, message: str | None) -> None:
    """A bare array is a chunk; every kind of error is one line."""
    good = pack({"actions": np.zeros((10, 14), np.float32)})
    frames = iter([good, frame])

    def answer(connection: ServerConnection, request: Any) -> None:
        connection.send(next(frames, good))

    with other_server(answer) as other:
        remote = RemotePolicy(other)
        if message is None:
            assert remote.infer(observe()).actions.shape == (10, 14)
        else:
            with pytest.raises(RemoteError, match=message) as error:
                remote.infer(observe())
            assert "\n" not in str(error.value)
            assert remote.infer(observe()).actions.shape == (10, 14)
        remote.close()


def test_a_late_answer_is_never_the_next_ones() -> None:
    """Fault: the protocol has no request ids; every chunk after a time-out is one too old."""
    slow = threading.Event()

    def answer(connection: ServerConnection, request: Any) -> None:
        if slow.is_set():
            slow.clear()
            time.sleep(0.4)
        connection.send(pack({"actions": np.tile(request["state"], (10, 1))}))

    with other_server(answer) as other:
        remote = RemotePolicy(other, answer_timeout_s=0.2)
        slow.set()
        with pytest.raises(RemoteError, match=r"no answer in 0\.2 s"):
            remote.infer(observe(1.0))
        time.sleep(0.4)
        np.testing.assert_allclose(remote.infer(observe(2.0)).actions, 2.0)
        remote.close()


def test_a_server_that_comes_back_is_used_again() -> None:
    with own_server(Steady()) as server:
        port = server.port
        remote = RemotePolicy(address(server))
        remote.infer(observe())
    started_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(RemoteError, match=f"127.0.0.1:{port}"):
            remote.infer(observe())
    assert time.monotonic() - started_s < 5.0
    with own_server(Steady(), port=port):
        assert remote.infer(observe(3.0)).actions[0, 0] == 3.0
        remote.close()


def test_a_server_of_another_robot_is_refused() -> None:
    named = pytest.raises(CheckpointError, match=r"the server's robot is 'droid', robot 'aloha'")
    with own_server(Steady(), robot="droid") as server, named:
        RemotePolicy(address(server))
    named = pytest.raises(CheckpointError, match=r"the server's state_dim is 7, .* has 14")
    with other_server(lambda *_: None, {"state_dim": 7}) as other, named:
        RemotePolicy(other)


def test_no_server_and_a_wrong_key_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no policy server at ws://127\.0\.0\.1:1: "):
        RemotePolicy("ws://127.0.0.1:1")
    with own_server(Steady(), api_key="secret") as server:
        with pytest.raises(CheckpointError, match="HTTP 401: set PI05_API_KEY"):
            RemotePolicy(address(server))
        monkeypatch.setenv("PI05_API_KEY", "secret")
        remote = open_policy(address(server))
        remote.infer(observe())
        getattr(remote, "close")()  # noqa: B009 - not in the protocol
    assert not is_address("small") and not is_address(None)


def test_a_client_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pi05_ros.adapters.factory import open_policy\n"
        "try: open_policy('ws://127.0.0.1:1')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert "no policy server at" in done.stdout, done.stderr
