"""`pi05 demo`: the simulated robot and the policy node as two processes, an instruction, motion.

What the newcomer sees is what a robot would get: lifecycle services, the `instruction` topic and
the figures of `~/status`, all over the middleware.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from pi05_lab.demo.client import DemoClient, DemoError
from pi05_lab.demo.judgement import judge_run
from pi05_lab.demo.plot import plot
from pi05_lab.demo.processes import DemoProcesses
from pi05_lab.demo.report import CameraCount, DemoRecord, failures, table
from pi05_lab.demo.video import write_video
from pi05_ros.msg import PolicyStatus

STARTUP_S = 90.0
"""Loading may read a cold disk and compile Python files on a slow machine."""
SETTLE_S = 0.4
"""Longer than any frame is on its way; counts are compared after it."""


@dataclass(frozen=True)
class DemoOptions:
    """What `pi05 demo` may be asked for."""

    instructions: Sequence[tuple[str, float]]
    """Text, and how many seconds it stands before the next one or the end."""
    output: Path
    checkpoint: str = ""
    params_file: str = ""
    video: bool = True
    bag: bool = False
    """Record a bag for `pi05 evaluate`."""


class Stages:
    """One progress line per stage; plain lines where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, text: str, total: float | None = None) -> TaskID:
        if not self._console.is_terminal:
            self._console.print(text)
        return self._progress.add_task(text, total=total, detail="")

    def show(self, stage: TaskID, completed: float, detail: str = "") -> None:
        self._progress.update(stage, completed=completed, detail=detail)

    def end(self, stage: TaskID, detail: str = "") -> None:
        self._progress.update(stage, total=1, completed=1, detail=detail)


def run_demo(options: DemoOptions, console: Console) -> int:
    """Run the demo and report; 0 only if frames, chunks and motion were there."""
    options.output.mkdir(parents=True, exist_ok=True)
    processes = DemoProcesses(options.output, options.checkpoint, options.params_file)
    record = DemoRecord(joint_names=[])
    client = None
    try:
        with Stages(console) as stages:
            processes.start()
            bag = options.output / "bag" if options.bag else None
            client = DemoClient(record, processes, bag)
            _perform(options, client, stages)
    except (DemoError, FileExistsError) as error:
        console.print(f"demo failed: {error}", style="bold red", highlight=False)
        return 1
    finally:
        if client is not None:
            client.close()
        record.problems += processes.stop()
    return _report(options, record, console)


def _perform(options: DemoOptions, client: DemoClient, stages: Stages) -> None:
    stage = stages.begin("the simulated robot starts")
    client.wait_for_robot(STARTUP_S)
    stages.end(stage)

    stage = stages.begin("the policy loads and warms up")
    client.change_state("configure", STARTUP_S)
    status = client.fresh_status()
    stages.end(stage, status.policy)

    stage = stages.begin("frames are counted from here on")
    client.set_cameras([])
    time.sleep(SETTLE_S)
    published_before, received_before = client.frame_counts()
    client.set_cameras(None)
    counting_since_s = time.monotonic()
    stages.end(stage)

    client.change_state("activate", 10.0)
    for text, seconds in options.instructions:
        stage = stages.begin(f'instruction: "{text}"', total=seconds)
        client.send_instruction(text)
        started_s = time.monotonic()
        while (elapsed_s := time.monotonic() - started_s) < seconds:
            client.check()
            status = client.status
            detail = (
                f"{status.inferences} chunks, latency p50 {1e3 * status.latency_p50_s:.0f} ms, "
                f"horizon left {status.horizon_left_s:.2f} s"
            )
            stages.show(stage, elapsed_s, detail)
            time.sleep(0.1)
        stages.end(stage, detail)

    stage = stages.begin("the arms stop")
    last = client.fresh_status()
    client.change_state("deactivate", 10.0)
    client.set_cameras([])
    counted_s = time.monotonic() - counting_since_s
    time.sleep(SETTLE_S)
    published, received = client.frame_counts()
    for name in received:
        count = received[name] - received_before[name]
        client.record.cameras[name] = CameraCount(
            published=published[name] - published_before[name],
            received=count,
            rate_hz=count / counted_s,
        )
    _keep_figures(client.record, last)
    client.keep_last_trajectories()
    client.keep_simulator_figures()
    stages.end(stage)


def _keep_figures(record: DemoRecord, status: PolicyStatus) -> None:
    record.policy = status.policy
    record.latency_s = (status.latency_p50_s, status.latency_p95_s, status.latency_p99_s)
    record.network_s = status.network_p50_s
    record.inferences, record.inference_failures = status.inferences, status.inference_failures
    record.chunks_received, record.chunks_used = status.chunks_received, status.chunks_used
    record.chunks_dropped = status.chunks_dropped
    record.command_rate_hz = status.tick_rate_hz
    record.jitter_s = (status.tick_jitter_p50_s, status.tick_jitter_p99_s)
    record.clamped = {
        kind: int(sum(getattr(status, f"clamped_{kind}")))
        for kind in ("position", "velocity", "acceleration")
    }


def _report(options: DemoOptions, record: DemoRecord, console: Console) -> int:
    record.outcomes = [str(outcome) for outcome in judge_run(record)]
    console.print(table(record))
    written = [options.output / "joints.png"]
    plot(record, written[0])
    if options.video and len(record.qpos_s) > 1:
        video, picture = options.output / "scene.mp4", options.output / "scene.png"
        middle = write_video(record, video)
        cv2.imwrite(str(picture), cv2.cvtColor(middle, cv2.COLOR_RGB2BGR))
        written += [video, picture]
    if options.bag:
        written.append(options.output / "bag")
    console.print("written: " + ", ".join(map(str, written)), highlight=False)
    found = failures(record)
    for line in found:
        console.print(f"failed: {line}", style="bold red", highlight=False)
    return 1 if found else 0
