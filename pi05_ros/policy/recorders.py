"""Recording what a function asks of the device, to ask for it again at once.

Outside the standard way (`torch.compile(mode="reduce-overhead")`), because Inductor's graph trees
keep their state per thread and decide by themselves when to record anew; here a replay is a replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 2
"""Runs before a recording: libraries choose kernels and make their workspaces in the first."""


class Recorded(Generic[T]):
    """A function's results, and what makes them anew from what its inputs hold by then."""

    def __init__(self, outputs: T, replay: Callable[[], T | None]) -> None:
        """`replay` returns the new outputs, or None if it writes into those that are there."""
        self.outputs = outputs
        self._replay = replay

    def replay(self) -> T:
        new = self._replay()
        if new is not None:
            self.outputs = new
        return self.outputs


class Recorder(Protocol):
    """Records functions that read tensors which stay where they are, and that never wait."""

    def record(self, run: Callable[[], T]) -> Recorded[T]: ...


class DirectRecorder:
    """Records nothing: a replay runs the function. For compiled code on a CPU."""

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        return Recorded(run(), run)


class CudaRecorder:
    """CUDA graphs that share one pool of memory.

    They are captured on one side stream, because the allocator keeps free memory by stream, and
    replayed one after the other, so each uses what the others left, but for outputs in use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may talk to the device meanwhile: only this one's mistakes count
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            outputs = run()
        return Recorded(outputs, graph.replay)
