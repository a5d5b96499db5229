"""What a control tick brings."""

from __future__ import annotations

from dataclasses import dataclass, field

from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.executor import Fault
from pi05_ros.types import ActionChunk


@dataclass(frozen=True)
class Tick:
    """What one control tick brought."""

    trajectory: TrajectoryPoints | None = None
    """To be published; None while there is nothing to follow."""
    chunks: list[tuple[ActionChunk, float]] = field(default_factory=list)
    """Chunks that arrived, in joint units, with their latency from stamp to use in seconds."""
    failures: list[str] = field(default_factory=list)
    """Inferences that failed, one line each."""
    notices: list[str] = field(default_factory=list)
    """What else a person should know, one line each."""
    finished_s: float | None = None
    """When the last of the chunks was there, by time.monotonic."""
    fault: Fault | None = None
    """Why the motion must end: the caller deactivates."""
