"""`pi05 serve`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from pi05_ros.cli import CommandError
from pi05_ros.server.device_queue import DeviceQueue
from pi05_ros.server.server import PolicyServer, ServeError, ServerSettings
from pi05_ros.types import Policy


def serve(
    checkpoint: Annotated[str, Argument(
        help="A folder, a Hugging Face id, or small; π0.5, π0, π0-FAST or a LeRobot policy.")],
    robot: Annotated[str, Option(help="Name, or a YAML description.")] = "aloha",
    host: Annotated[str, Option(
        help="Address to listen on; beyond this machine it needs --api-key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[str, Option(
        envvar="PI05_API_KEY", help="Clients must send it; best by the environment.",
        show_default=False)] = "",
    certificate: Annotated[str, Option(help="PEM file, for TLS.")] = "",
    key: Annotated[str, Option(help="PEM file of the certificate's private key.")] = "",
    prompt: Annotated[str, Option(help="Instruction of requests without one.")] = "",
    max_batch: Annotated[int, Option(
        min=1, help="Requests that are inferred together if several wait.")] = 1,
    max_waiting: Annotated[int, Option(min=1, help="Further requests are refused.")] = 256,
    device: Annotated[str, Option(help="Of the network.")] = "auto",
    threads: Annotated[int | None, Option(
        min=1, show_default="torch's", help="CPU threads of the network.")] = None,
) -> int:  # fmt: skip
    """Serve until Ctrl-C; the exit code."""
    settings = ServerSettings(host, port, api_key, certificate, key, prompt=prompt)

    def load() -> Policy:
        from pi05_ros.adapters.factory import open_policy  # loads torch, which --help does not need

        return open_policy(checkpoint, robot, device=device, threads=threads)

    lost: list[str] = []

    def on_lost(reason: str) -> None:
        lost.append(reason)
        os.kill(os.getpid(), signal.SIGTERM)

    queue = DeviceQueue(load, max_batch, max_waiting, on_lost)
    try:
        settings.check()
        queue.start()
        policy = queue.wait_ready()
        server = PolicyServer(queue, policy, settings, robot)
        asyncio.run(_until_interrupted(server, Console()))
    except (ServeError, ValueError, OSError) as error:  # a CheckpointError is a ValueError
        raise CommandError(str(error)) from None
    finally:
        queue.stop(2.0)
    if lost:
        raise CommandError(f"the device is lost for this process, start another: {lost[0]}")
    return 0


async def _until_interrupted(server: PolicyServer, console: Console) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, ended.set)
    async with server.listening():
        scheme = "wss" if server.settings.certificate else "ws"
        console.print(
            f"{server.metadata['policy']}\n{scheme}://{server.settings.host}:{server.port}",
            highlight=False,
        )
        await ended.wait()
