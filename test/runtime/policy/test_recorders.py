"""CUDA graphs, as far as they can be looked at without a GPU: what is asked of torch, in order."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pi05_ros.policy.inference import WARM_UPS, CudaRecorder, DirectRecorder


def test_a_direct_replay_runs_again() -> None:
    given = torch.zeros(2)
    recorded = DirectRecorder().record(lambda: given + 1)
    given += 5
    assert recorded.outputs.tolist() == [1, 1]
    assert recorded.replay().tolist() == recorded.outputs.tolist() == [6, 6]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda as a list of what was asked of it; capturing has torch's own signature."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = str(name)

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    signature = inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        given = signature.bind(None, *args, **kwargs).arguments
        log.append(f"capture on {given['stream'].name}, {given['capture_error_mode']}")
        assert given["pool"] == "pool"
        yield
        log.append("captured")

    @contextlib.contextmanager
    def stream(on: Stream) -> Iterator[None]:
        log.append(f"on {on.name}")
        yield

    made = 0

    def side_stream(_: torch.device) -> Stream:
        nonlocal made
        made += 1
        return Stream("side" if made == 1 else f"side {made}")

    for name, stand_in in (
        ("Stream", side_stream),
        ("current_stream", lambda _: Stream("main")),
        ("stream", stream),
        ("CUDAGraph", Graph),
        ("graph", graph),
        ("graph_pool_handle", lambda: "pool"),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return log


def test_a_graph_is_warmed_up_captured_once_and_replayed(asked: list[str]) -> None:
    """Fault: a capture of the first run, when libraries still allocate; a stream not waited for."""
    recorder = CudaRecorder(torch.device("cuda"))
    runs = 0

    def run() -> int:
        nonlocal runs
        runs += 1
        asked.append("run")
        return runs

    recorded = recorder.record(run)
    assert asked == [
        "side waits for main", "on side", *["run"] * WARM_UPS, "main waits for side",
        "capture on side, thread_local", "run", "captured",
    ]  # fmt: skip
    assert recorded.outputs == recorded.replay() == runs == WARM_UPS + 1
    assert asked[-1] == "replay"


def test_all_graphs_are_captured_on_one_stream(asked: list[str]) -> None:
    """Fault: a stream for each graph, between which the pool shares no memory."""
    recorder = CudaRecorder(torch.device("cuda"))
    for _ in range(3):
        recorder.record(lambda: 0)
    assert asked.count("capture on side, thread_local") == 3
