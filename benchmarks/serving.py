"""What `pi05 serve` adds to a chunk, and how many robots it serves: docs/serving.md's figures.

    python benchmarks/serving.py [--seconds 20] [--checkpoint small]

One run on one machine: in-process chunks and chunks through the server in turns; 1 to 64 simulated
robots that ask again as soon as they have an answer, without and with batches; a server that infers
in its event loop, as openpi's does; memory after many requests. Server and robots are processes of
their own on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from pi05_ros.adapters.factory import open_policy
from pi05_ros.adapters.remote import RemotePolicy
from pi05_ros.protocol import pack, unpack
from pi05_ros.server.dialects import Dialect, Expected, answer, read_request
from pi05_ros.types import Observation

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
ROBOTS = (1, 4, 16, 64)
MEMORY_REQUESTS = 100_000
PAIRS = 100


def observe(seed: int = 0) -> Observation:
    random = np.random.default_rng(seed)
    images = {name: random.integers(0, 256, (84, 112, 3), dtype=np.uint8) for name in CAMERAS}
    state = random.uniform(-0.5, 0.5, 14)
    return Observation(images, state, "touch the red cube with the left arm", 0.0)


def message(seed: int) -> bytes:
    observation = observe(seed)
    images = {name: image.transpose(2, 0, 1) for name, image in observation.images.items()}
    return pack({"images": images, "state": observation.state, "prompt": observation.instruction})


@contextmanager
def server(checkpoint: str, *options: str) -> Iterator[tuple[int, int]]:
    """`pi05 serve` as a process; its port and process id."""
    command = [sys.executable, "-m", "pi05_ros.cli", "serve", checkpoint, "--port", "0", *options]
    process = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.fullmatch(r"ws://127\.0\.0\.1:(\d+)\n", line):
                yield int(found[1]), process.pid
                return
        raise SystemExit("the server ended before it listened")
    finally:
        process.terminate()
        process.wait()


def in_event_loop(checkpoint: str, port: multiprocessing.Queue[int]) -> None:
    """A server that infers in its event loop."""
    policy = open_policy(checkpoint, device="cpu", threads=1)
    expected = Expected(tuple(policy.cameras), 14, policy.horizon, 14)

    async def handle(connection: ServerConnection) -> None:
        await connection.send(pack({}))
        async for data in connection:
            assert isinstance(data, bytes)
            request = read_request(unpack(data), expected, time.time())
            assert request.observation is not None
            await connection.send(
                pack(answer(policy.infer(request.observation), Dialect.OPENPI, {}))
            )

    async def run() -> None:
        async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as made:
            port.put(next(iter(made.sockets)).getsockname()[1])
            await asyncio.Future()

    asyncio.run(run())


def overhead(checkpoint: str) -> tuple[list[float], list[float]]:
    """Seconds of chunks in this process and through the server, in turns."""
    policy = open_policy(checkpoint, device="cpu", threads=1)
    found: tuple[list[float], list[float]] = ([], [])
    with server(checkpoint) as (port, _):
        remote = RemotePolicy(f"ws://127.0.0.1:{port}", answer_timeout_s=30.0)
        for index in range(PAIRS + 5):
            for samples, each in zip(found, (policy, remote), strict=True):
                started_s = time.perf_counter()
                each.infer(observe(index))
                if index >= 5:
                    samples.append(time.perf_counter() - started_s)
        remote.close()
    return found


def drive(port: int, robots: int, seconds: float) -> list[list[float]]:
    """Latencies of every robot's answers, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_drive, (port, robots, seconds))


def _drive(port: int, robots: int, seconds: float) -> list[list[float]]:
    async def robot(number: int) -> list[float]:
        data, latencies = message(number), []
        uri = f"ws://127.0.0.1:{port}"
        async with connect(uri, compression=None, max_size=None, proxy=None) as connection:
            await connection.recv()
            while time.monotonic() < end_s:
                started_s = time.monotonic()
                await connection.send(data)
                assert isinstance(await connection.recv(), bytes)
                if time.monotonic() < end_s:
                    latencies.append(time.monotonic() - started_s)
        return latencies

    async def run() -> list[list[float]]:
        return await asyncio.gather(*(robot(number) for number in range(robots)))

    end_s = time.monotonic() + seconds
    return asyncio.run(run())


def row(name: str, robots: int, found: Sequence[Sequence[float]], seconds: float) -> list[str]:
    latencies = [value for each in found for value in each]
    counts = [len(each) for each in found]
    p50, p99 = np.percentile(latencies, (50, 99)) * 1e3
    share = max(counts) / max(1, min(counts))
    return [name, str(robots), f"{len(latencies) / seconds:.1f}", f"{p50:.0f}", f"{p99:.0f}",
            f"{share:.2f}"]  # fmt: skip


def throughput(checkpoint: str, seconds: float) -> Iterator[list[str]]:
    for name, options in (("one by one", ()), ("batches of 8", ("--max-batch", "8"))):
        with server(checkpoint, *options) as (port, _):
            drive(port, 1, 3.0)
            for robots in ROBOTS:
                yield row(name, robots, drive(port, robots, seconds), seconds)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=in_event_loop, args=(checkpoint, queue), daemon=True)
    process.start()
    port = queue.get()
    drive(port, 1, 3.0)
    for robots in ROBOTS:
        yield row("in the event loop", robots, drive(port, robots, seconds), seconds)
    process.terminate()


def memory_mb(requests: int) -> tuple[float, float]:
    """Resident memory of a server with a policy that does nothing, after 1 % and all requests."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory_mb, (requests,))


def _memory_mb(requests: int) -> tuple[float, float]:
    from pi05_ros.server.device_queue import DeviceQueue
    from pi05_ros.server.server import PolicyServer, ServerSettings
    from pi05_ros.types import ActionChunk, ActionPrefix

    class Nothing:
        horizon, dt_s, state_dim, action_dim = 50, 0.02, 14, 14
        cameras, description = CAMERAS, "nothing"

        def infer(self, seen: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
            return ActionChunk(np.zeros((50, 14)), seen.stamp_s, 0.02)

    def resident_mb() -> float:
        text = Path("/proc/self/statm").read_text()
        return int(text.split()[1]) * resource.getpagesize() / 2**20

    async def run() -> tuple[float, float]:
        queue = DeviceQueue(Nothing)
        queue.start()
        made = PolicyServer(queue, queue.wait_ready(), ServerSettings(port=0))
        data, early_mb = message(0), 0.0
        async with made.listening():
            uri = f"ws://127.0.0.1:{made.port}"
            async with connect(uri, compression=None, proxy=None) as connection:
                await connection.recv()
                for index in range(requests):
                    await connection.send(data)
                    await connection.recv()
                    if index == requests // 100:
                        early_mb = resident_mb()
        queue.stop()
        return early_mb, resident_mb()

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of robots")
    parser.add_argument("--requests", type=int, default=MEMORY_REQUESTS)
    options = parser.parse_args()
    console = Console()
    alone, served = (np.array(samples) * 1e3 for samples in overhead(options.checkpoint))
    for name, values in (("in process", alone), ("through the server", served),
                         ("added, in pairs", served - alone)):  # fmt: skip
        p50, p99 = np.percentile(values, (50, 99))
        console.print(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    table = Table(
        title=f"{options.checkpoint}, {options.seconds:g} s each, one core for the network"
    )
    for heading in ("server", "robots", "chunks/s", "p50 ms", "p99 ms", "largest/smallest share"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for found in throughput(options.checkpoint, options.seconds):
        table.add_row(*found)
    console.print(table)
    early_mb, late_mb = memory_mb(options.requests)
    console.print(
        f"memory after {options.requests // 100:,} requests {early_mb:.1f} MiB, after "
        f"{options.requests:,} {late_mb:.1f} MiB"
    )


if __name__ == "__main__":
    main()
