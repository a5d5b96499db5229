"""Runs the simulated robot and the policy node as two processes and gives them instructions.

The client uses what a robot's operator would: lifecycle services, the `instruction` topic, and the
figures of `~/status`, all over the middleware.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pi05_lab.console import say
from pi05_lab.demo.client import DemoClient, DemoError, connect
from pi05_lab.demo.processes import DemoProcesses
from pi05_lab.demo.report import CameraCount, DemoRecord, failures, plot, table, write_video
from pi05_ros.msg import PolicyStatus

STARTUP_S = 90.0
"""Loading may read a cold disk and compile Python files on a slow machine."""
SETTLE_S = 0.4
"""Longer than a frame is in transit; frames are counted after it."""


Show = Callable[[float, str], None]


class Stages:
    """One progress line per stage; plain lines if the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    @contextmanager
    def stage(self, text: str, total: float | None = None) -> Iterator[Show]:
        """The function shows how much of `total` is done, and a detail."""
        if not self._console.is_terminal:
            self._console.print(text)
        task = self.progress.add_task(text, total=total, detail="")

        def show(completed: float, detail: str) -> None:
            self.progress.update(task, completed=completed, detail=detail)

        yield show
        self.progress.update(task, total=1, completed=1)


def run_demo(
    console: Console,
    instructions: Sequence[tuple[str, float]],
    output: Path,
    checkpoint: str,
    params_file: str,
    video: bool,
    bag: bool,
) -> int:
    """Run the demo and report.

    Args:
        console: for progress and report.
        instructions: text, and seconds until the next one or the end.
        output: folder of logs and results.
        checkpoint: "" takes the params file's.
        params_file: "" takes config/aloha.yaml.
        video: write a video.
        bag: record a bag for `pi05 evaluate`.

    Returns:
        Exit code: 0 only if there were frames, chunks and motion.
    """
    output.mkdir(parents=True, exist_ok=True)
    processes = DemoProcesses(output, checkpoint, params_file)
    record = DemoRecord(joint_names=[])
    stages = Stages(console)
    try:
        with (
            stages.progress,
            connect(processes, record, output / "bag" if bag else None) as client,
        ):
            _perform(instructions, client, stages.stage)
    except (DemoError, FileExistsError) as error:
        console.print(f"demo failed: {error}", style="bold red", highlight=False)
        return 1
    console.print(table(record))
    written = [output / "joints.png"]
    plot(record, written[0])
    if video and len(record.qpos_s) > 1:
        written += [output / "scene.mp4", output / "scene.png"]
        middle = write_video(record, written[1])
        cv2.imwrite(str(written[2]), cv2.cvtColor(middle, cv2.COLOR_RGB2BGR))
    if bag:
        written.append(output / "bag")
    say(console, "written: " + ", ".join(map(str, written)))
    found = failures(record)
    for line in found:
        say(console, f"failed: {line}", "bold red")
    return 1 if found else 0


def _perform(
    instructions: Sequence[tuple[str, float]],
    client: DemoClient,
    stage: Callable[..., AbstractContextManager[Show]],
) -> None:
    with stage("the simulated robot starts"):
        client.wait_for_robot(STARTUP_S)
    with stage("the policy loads and warms up") as show:
        client.change_state("configure", STARTUP_S)
        show(0.0, client.fresh_status().policy)
    with stage("frames are counted from here on"):
        client.set_cameras([])
        time.sleep(SETTLE_S)
        published_before, received_before = client.frame_counts()
        client.set_cameras(None)
        counting_since_s = time.monotonic()
    client.change_state("activate", 10.0)
    for text, seconds in instructions:
        with stage(f'instruction: "{text}"', total=seconds) as show:
            client.send_instruction(text)
            started_s = time.monotonic()
            while (elapsed_s := time.monotonic() - started_s) < seconds:
                client.check()
                status = client.status
                show(
                    elapsed_s,
                    f"{status.inferences} chunks, latency p50 {1e3 * status.latency_p50_s:.0f} ms, "
                    f"horizon left {status.horizon_left_s:.2f} s",
                )
                time.sleep(0.1)
    with stage("the arms stop"):
        last = client.fresh_status()
        client.change_state("deactivate", 10.0)
        client.set_cameras([])
        counted_s = time.monotonic() - counting_since_s
        time.sleep(SETTLE_S)
        published, received = client.frame_counts()
        for name in received:
            count = received[name] - received_before[name]
            client.record.cameras[name] = CameraCount(
                published[name] - published_before[name], count, count / counted_s
            )
        _keep_figures(client.record, last)
        client.keep_last_trajectories()
        client.keep_simulator_figures()


def _keep_figures(record: DemoRecord, status: PolicyStatus) -> None:
    record.policy = status.policy
    record.latency_s = (status.latency_p50_s, status.latency_p95_s, status.latency_p99_s)
    record.network_s = status.network_p50_s
    record.inference_failures = status.inference_failures
    record.chunks_received, record.chunks_used = status.chunks_received, status.chunks_used
    record.chunks_dropped = status.chunks_dropped
    record.command_rate_hz = status.tick_rate_hz
    record.jitter_s = (status.tick_jitter_p50_s, status.tick_jitter_p99_s)
    record.clamped = {
        kind: int(sum(getattr(status, f"clamped_{kind}")))
        for kind in ("position", "velocity", "acceleration")
    }
