"""What a control tick brings."""

from __future__ import annotations

from dataclasses import dataclass, field

from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.executor import Fault
from pi05_ros.types import ActionChunk


@dataclass(frozen=True)
class Braking:
    """A motion that ends: every output follows `stream.commanded` from `start_s` to `rest_s`."""

    trajectory: TrajectoryPoints | None
    """For controllers that take trajectories. None if they have it already: after a clock jump the
    tail of the last trajectory brakes, and a braking under way continues."""
    start_s: float
    """Where the motion is at this moment, on the stream's clock."""
    rest_s: float
    """When it rests, on the stream's clock."""


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
    braking: Braking | None = None
    """The runner ended the motion in this tick; `trajectory` is None then."""
