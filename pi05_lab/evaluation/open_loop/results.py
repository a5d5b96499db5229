"""The result of one recording: the rows of `OUTPUT/recordings/*.json`.

Numbers are rounded where the rows are made, so a result that is read back equals the one that was
written. Unknown values are None. Names of conditions, policies and schedulers are keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from pi05_lab.data.bags import Note
from pi05_ros.types import FloatArray

Number = float | None
Numbers = list[Number]


@dataclass(frozen=True)
class StreamRow:
    """How regularly the messages of one topic came."""

    topic: str
    messages: int
    rate_hz: float
    period_ms: Numbers
    """p50, p99, largest."""
    age_ms: Numbers
    """p50, p95, p99 of stamp to receipt."""
    gaps: int
    longest_gaps: list[Numbers]
    """Length in ms, start in s since the recording's."""
    out_of_order: int
    first_s: float
    silent_s: float


@dataclass(frozen=True)
class ErrorRow:
    """Errors of a condition in an episode: sums of |error| and error² over chunks and steps."""

    chunks: int
    by_joint: list[float]
    squared_by_joint: list[float]
    by_step: list[float]
    """Mean over the arm joints."""
    steps: list[int]


@dataclass(frozen=True)
class GripperCounts:
    """Openings and closings of the grippers; see `metrics.GripperTally`."""

    found: int
    missed: int
    invented: int
    changes: int
    changes_found: int


@dataclass(frozen=True)
class GripperRow(GripperCounts):
    """The grippers in an episode."""

    offsets_s: list[float]


@dataclass(frozen=True)
class ExecutedRow:
    """Motion that a scheduler and the limits command in an episode."""

    windows: list[Numbers]
    """Duration, RMS jerk, LDLJ, SPARC of each; see `metrics.MotionWindows`."""
    by_joint: list[float]
    ticks: int


@dataclass(frozen=True)
class TrackRow:
    """One policy in one episode."""

    errors: dict[str, ErrorRow]
    grippers: dict[str, GripperRow]
    shifts: dict[str, list[float]]
    """Ablation → sum over chunks of the mean |action change| in rad, and chunks."""
    executed: dict[str, ExecutedRow]


@dataclass(frozen=True)
class EpisodeRow:
    """A stretch of a recording with one instruction."""

    instruction: str
    start_s: float
    duration_s: float
    recorded_windows: list[Numbers]
    positions: list[list[float]]
    """Evenly spaced reference positions, for the joints' ranges."""
    tracks: dict[str, TrackRow]


@dataclass(frozen=True)
class SchedulerRow:
    """One scheduler over a whole recording."""

    ticks: int
    clamps: dict[str, list[int]]
    chunks: dict[str, int]
    seams_rad: list[float]
    """Changes of the target at chunk boundaries."""
    seam_max_rad: float | None


@dataclass(frozen=True)
class TraceRow:
    """What is drawn of a policy on a recording."""

    times_s: list[float]
    recorded: list[Numbers]
    commanded: dict[str, list[Numbers]]
    dots: list[Any]
    """(stamp, first step [n_joints])."""
    chunks: list[Any]
    """(times [m], positions [m, n_joints])."""
    errors: list[Numbers]
    """(stamp, error of the policy, error of holding the position), rad."""


@dataclass(frozen=True)
class WorstSample:
    """An observation with one of the largest errors, with its images as base64 JPEG."""

    error: float
    hold: float
    stamp_s: float
    instruction: str
    before: dict[str, str]
    after: dict[str, str]


@dataclass(frozen=True)
class PolicyCounts:
    """A policy and its inferences."""

    description: str
    horizon: int
    dt_s: float
    inferences: int
    failures: int
    unscored: int


@dataclass(frozen=True)
class PolicyRow(PolicyCounts):
    """One policy over a whole recording."""

    slower_than_delay: int | None
    stages_s: dict[str, list[float]]
    schedulers: dict[str, SchedulerRow]
    traces: TraceRow
    worst: list[WorstSample]


@dataclass(frozen=True)
class RecordingHead:
    """What metrics.json repeats of a recording."""

    name: str
    duration_s: float
    moments: int
    """Times at which an inference was due; `observations` of them had an observation."""
    observations: int
    skew_ms: Numbers
    age_ms: Numbers
    streams: list[StreamRow]


@dataclass(frozen=True)
class RecordingResult(RecordingHead):
    """One recording."""

    commanded_joints: list[str]
    notes: list[Note]
    episodes: list[EpisodeRow]
    policies: dict[str, PolicyRow]
    wall_s: float | None


def inherited(base: type[Any], row: Any) -> dict[str, Any]:
    """The values of a row's fields that are those of `base`."""
    return {field.name: getattr(row, field.name) for field in fields(base)}


def to_json(row: Any) -> dict[str, Any]:
    """The dictionary of a row; an ablation's `moves_plan_rad` is left out where it is None."""
    omitted = ("moves_plan_rad", None)
    return asdict(row, dict_factory=lambda items: {k: v for k, v in items if (k, v) != omitted})


def from_json(kind: Any, value: Any) -> Any:
    """The row of type `kind` from its dictionary.

    Raises:
        TypeError, KeyError, AttributeError: the dictionary is of something else.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return {name: from_json(arguments[1], each) for name, each in value.items()}
    if value is None or not arguments or not is_dataclass(arguments[0]):
        return value
    if get_origin(kind) is list:
        return [from_json(arguments[0], each) for each in value]
    return from_json(arguments[0], value)


def rounded(values: FloatArray | Sequence[float], digits: int = 5) -> Any:
    """Nested lists with few digits, None for what is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    return [round(float(v), digits) if np.isfinite(v) else None for v in array]


def percentiles(values: Sequence[float], shares: Sequence[float] = (50, 95, 99)) -> list[float]:
    """Percentiles; empty for no values."""
    if not len(values):
        return []
    return [float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), shares)]
