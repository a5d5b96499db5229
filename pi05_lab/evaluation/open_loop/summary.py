"""The figures of all recordings together: metrics.json.

Errors are those of a chunk's step k against the reference at t + k·dt. Means over joints are over
the arms' joints (rad), without grippers. Unknown values are None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pi05_lab.data.bags import Note
from pi05_lab.evaluation.open_loop.conditions import Condition
from pi05_lab.evaluation.open_loop.metrics import BoolArray, gripper_f1
from pi05_lab.evaluation.open_loop.results import (
    GripperCounts,
    GripperRow,
    Number,
    Numbers,
    PolicyCounts,
    PolicyRow,
    RecordingHead,
    RecordingResult,
    TrackRow,
    inherited,
    percentiles,
    rounded,
)
from pi05_lab.evaluation.statistics import bootstrap_interval
from pi05_ros.types import FloatArray, JointGroup

MOVING_SHARE = 0.01
"""A joint counts as moving if it uses more than this share of its limits."""
_ABLATIONS = (Condition.SUBSET, Condition.WRONG_INSTRUCTION, Condition.BLACK_IMAGES)
_ORDER = (Condition.POLICY, *Condition.BASELINES, *_ABLATIONS)


@dataclass(frozen=True)
class Change:
    """How much larger an error is than another condition's, as a share of it."""

    share: Number
    share_95: Numbers | None
    """Confidence interval over episodes."""


@dataclass(frozen=True)
class GripperSummary(GripperCounts):
    """The grippers in all episodes."""

    f1: Number
    offset_s: Number
    """Mean time of a predicted change after the recorded one."""
    offset_abs_s: Number


@dataclass(frozen=True)
class ConditionSummary:
    """Errors of the policy, of an ablation or of a baseline."""

    chunks: int
    mae_rad: Number
    mae_rad_95: Numbers | None
    rmse_rad: Number
    mae_share: Number
    """Of the joints' ranges."""
    by_step_rad: Numbers
    against: str
    """The condition that it is compared with, on the same observations."""
    change: Change | None
    gripper: GripperSummary
    moves_plan_rad: Number = None
    """Mean action change of an ablation."""


@dataclass(frozen=True)
class JointSummary:
    """One joint; its range is q99 − q01 of the reference, 0 where it hardly moved."""

    unit: str
    range: Number
    mae: Number
    rmse: Number
    mae_share: Number
    hold_mae: Number


@dataclass(frozen=True)
class SchedulerSummary:
    """The motion that a scheduler and the limits command."""

    executed_mae_rad: Number
    seam_rad: Numbers
    """p50, p95, largest change of the target at a chunk boundary."""
    rms_jerk: Number
    ldlj: Number
    sparc: Number
    clamped: dict[str, Number]
    ticks: int
    chunks: dict[str, int]


@dataclass(frozen=True)
class LatencySummary:
    """p50, p95, p99 of each stage."""

    stages_ms: dict[str, Numbers]
    slower_than_delay: int | None


@dataclass(frozen=True)
class PolicySummary(PolicyCounts):
    """One policy on all recordings."""

    conditions: dict[str, ConditionSummary]
    joints: dict[str, JointSummary]
    schedulers: dict[str, SchedulerSummary]
    latency: LatencySummary


@dataclass(frozen=True)
class RecordingSummary(RecordingHead):
    """One recording."""

    instructions: list[str]
    mae_rad: dict[str, dict[str, Number]]
    """Policy → of the policy and of holding the position."""
    notes: list[Note]
    wall_s: Number


@dataclass(frozen=True)
class Totals:
    """What was evaluated."""

    recordings: int
    failed: int
    episodes: int
    duration_s: float
    moments: int
    observations: int


@dataclass(frozen=True)
class Summary:
    """The content of metrics.json."""

    settings: dict[str, Any]
    totals: Totals
    ranges: dict[str, Number]
    commanded_joints: list[str]
    policies: dict[str, PolicySummary]
    recorded_motion: dict[str, Number]
    recordings: list[RecordingSummary]
    failed: dict[str, str]
    trained_on: dict[str, list[str]]
    dropped: list[dict[str, Any]]


def summarize(
    results: Sequence[RecordingResult],
    failed: Mapping[str, str],
    joints: JointGroup,
    settings: Mapping[str, Any],
    trained_on: Mapping[str, Sequence[str]] | None = None,
) -> Summary:
    """Put the recordings' results together, in the order of the report.

    Args:
        results: of the recordings.
        failed: recording → why it has no result.
        joints: of the robot.
        settings: to show.
        trained_on: policy → the recordings that it was trained on.
    """
    ranges = _ranges(results, joints)
    names = dict.fromkeys(name for result in results for name in result.policies)
    episodes = [episode for result in results for episode in result.episodes]
    return Summary(
        settings=dict(settings),
        totals=Totals(
            recordings=len(results),
            failed=len(failed),
            episodes=len(episodes),
            duration_s=round(sum(result.duration_s for result in results), 3),
            moments=sum(result.moments for result in results),
            observations=sum(result.observations for result in results),
        ),
        ranges={name: _number(value) for name, value in zip(joints.names, ranges, strict=True)},
        commanded_joints=sorted({name for r in results for name in r.commanded_joints}),
        policies={name: _policy(name, results, joints, ranges) for name in names},
        recorded_motion=_motion(w for episode in episodes for w in episode.recorded_windows),
        recordings=[_recording(result) for result in results],
        failed=dict(failed),
        trained_on={name: list(own) for name, own in (trained_on or {}).items() if own},
        dropped=[{"recording": r.name, **vars(note)} for r in results for note in r.notes],
    )


def _policy(
    name: str, results: Sequence[RecordingResult], joints: JointGroup, ranges: FloatArray
) -> PolicySummary:
    rows = [result.policies[name] for result in results if name in result.policies]
    tracks = [e.tracks[name] for r in results for e in r.episodes if name in e.tracks]
    found = {condition for track in tracks for condition in track.errors}
    conditions = [c for c in _ORDER if c in found] + sorted(found - set(_ORDER))
    arm = ~joints.gripper if (~joints.gripper).any() else np.ones(len(joints), dtype=bool)
    stages: dict[str, list[float]] = {}
    for row in rows:
        for stage, samples in row.stages_s.items():
            stages.setdefault(stage, []).extend(samples)
    slow = [row.slower_than_delay for row in rows if row.slower_than_delay is not None]
    return PolicySummary(
        description=rows[0].description,
        horizon=rows[0].horizon,
        dt_s=rows[0].dt_s,
        inferences=sum(row.inferences for row in rows),
        failures=sum(row.failures for row in rows),
        unscored=sum(row.unscored for row in rows),
        conditions={name: _condition(name, tracks, arm, ranges) for name in conditions},
        joints=_by_joint(tracks, joints, ranges),
        schedulers={
            method: _scheduler(method, rows, tracks, arm)
            for method in dict.fromkeys(method for row in rows for method in row.schedulers)
        },
        latency=LatencySummary(
            {
                stage: rounded([1e3 * value for value in percentiles(samples)], 3)
                for stage, samples in stages.items()
            },
            sum(slow) if slow else None,
        ),
    )


def _condition(
    name: str, tracks: Sequence[TrackRow], arm: BoolArray, ranges: FloatArray
) -> ConditionSummary:
    tracks = [track for track in tracks if name in track.errors]
    errors = [track.errors[name] for track in tracks]
    absolute = np.array([each.by_joint for each in errors])
    squared = np.array([each.squared_by_joint for each in errors])
    steps = np.array([each.steps for each in errors])
    total = max(1, int(steps.sum()))
    by_joint = absolute.sum(axis=0) / total
    by_step = np.array([each.by_step for each in errors]).sum(axis=0)
    counts = steps.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(ranges > 0, by_joint / ranges, np.nan)[arm]
        by_step = by_step / np.where(counts > 0, counts, np.nan)
    moving = share[np.isfinite(share)]
    ablation = name.partition(":")[0] in _ABLATIONS
    against = Condition.SUBSET if ablation else Condition.HOLD
    shifts = [track.shifts[name] for track in tracks if name in track.shifts]
    count = sum(chunks for _, chunks in shifts)
    interval = bootstrap_interval(
        absolute[:, arm].mean(axis=1).tolist(), steps.sum(axis=1).tolist()
    )
    return ConditionSummary(
        chunks=sum(each.chunks for each in errors),
        mae_rad=_number(by_joint[arm].mean()),
        mae_rad_95=interval and [_number(bound) for bound in interval],
        rmse_rad=_number(math.sqrt(float((squared.sum(axis=0) / total)[arm].mean()))),
        mae_share=_mean(moving),
        by_step_rad=rounded(by_step, 6),
        against=against,
        change=_change(tracks, name, against, arm),
        gripper=_gripper([track.grippers[name] for track in tracks]),
        moves_plan_rad=_number(sum(total for total, _ in shifts) / count) if count else None,
    )


def _change(tracks: Sequence[TrackRow], name: str, against: str, arm: BoolArray) -> Change | None:
    both = [track.errors for track in tracks if against in track.errors]
    mine, others = (
        [float(np.array(errors[each].by_joint)[arm].mean()) for errors in both]
        for each in (name, against)
    )
    if name == against or sum(others) <= 0:
        return None
    interval = bootstrap_interval(mine, others)
    share = _number(sum(mine) / sum(others) - 1)
    return Change(share, interval and [_number(bound - 1) for bound in interval])


def _gripper(rows: Sequence[GripperRow]) -> GripperSummary:
    counts = {
        field.name: sum(getattr(row, field.name) for row in rows) for field in fields(GripperCounts)
    }
    offsets = np.array([value for row in rows for value in row.offsets_s])
    f1 = gripper_f1(counts["found"], counts["missed"], counts["invented"])
    return GripperSummary(
        **counts, f1=_number(f1), offset_s=_mean(offsets), offset_abs_s=_mean(np.abs(offsets))
    )


def _by_joint(
    tracks: Sequence[TrackRow], joints: JointGroup, ranges: FloatArray
) -> dict[str, JointSummary]:
    def means(condition: str, column: str) -> FloatArray:
        errors = [track.errors[condition] for track in tracks if condition in track.errors]
        if not errors:
            return np.full(len(joints), np.nan)
        total = np.array([getattr(each, column) for each in errors]).sum(axis=0)
        return np.asarray(total / max(1, sum(sum(each.steps) for each in errors)))

    mae, squared = means(Condition.POLICY, "by_joint"), means(Condition.POLICY, "squared_by_joint")
    hold = means(Condition.HOLD, "by_joint")
    return {
        name: JointSummary(
            unit="m" if joints.gripper[k] and joints.upper[k] < 0.5 else "rad",
            range=_number(ranges[k]),
            mae=_number(mae[k]),
            rmse=_number(math.sqrt(max(0.0, float(squared[k])))),
            mae_share=_number(mae[k] / ranges[k]) if ranges[k] > 0 else None,
            hold_mae=_number(hold[k]),
        )
        for k, name in enumerate(joints.names)
    }


def _scheduler(
    method: str, rows: Sequence[PolicyRow], tracks: Sequence[TrackRow], arm: BoolArray
) -> SchedulerSummary:
    replays = [row.schedulers[method] for row in rows if method in row.schedulers]
    executed = [track.executed[method] for track in tracks if method in track.executed]
    ticks = sum(replay.ticks for replay in replays)
    compared = sum(each.ticks for each in executed)
    absolute = np.array([each.by_joint for each in executed]).sum(axis=0)
    changes = [value for replay in replays for value in replay.seams_rad]
    maxima = [r.seam_max_rad for r in replays if r.seam_max_rad is not None]
    chunks: Counter[str] = Counter()
    for replay in replays:
        chunks.update(replay.chunks)
    return SchedulerSummary(
        executed_mae_rad=_number(absolute[arm].mean() / compared) if compared else None,
        seam_rad=rounded([*percentiles(changes, (50, 95)), *sorted(maxima)[-1:]], 6),
        **_motion(window for each in executed for window in each.windows),
        clamped={
            kind: _number(sum(sum(replay.clamps[kind]) for replay in replays) / (ticks * len(arm)))
            for kind in replays[0].clamps
            if ticks
        },
        ticks=ticks,
        chunks=dict(chunks),
    )


def _motion(windows: Iterable[Numbers]) -> dict[str, Number]:
    """Means over the windows in which something moves, weighted with their durations."""
    windows = list(windows)
    found: dict[str, Number] = {}
    for k, name in enumerate(("rms_jerk", "ldlj", "sparc"), start=1):
        known = [(w[0] or 0.0, w[k] or 0.0) for w in windows if w[k] is not None]
        weight = sum(duration for duration, _ in known)
        total = sum(duration * value for duration, value in known)
        found[name] = _number(total / weight) if weight else None
    return found


def _recording(result: RecordingResult) -> RecordingSummary:
    def mae(policy: str, condition: str) -> Number:
        tracks = [e.tracks[policy].errors for e in result.episodes if policy in e.tracks]
        errors = [own[condition] for own in tracks if condition in own]
        steps = sum(sum(each.steps) for each in errors)
        return _number(sum(sum(each.by_step) for each in errors) / steps) if steps else None

    both = (Condition.POLICY, Condition.HOLD)
    return RecordingSummary(
        **inherited(RecordingHead, result),
        instructions=[episode.instruction for episode in result.episodes],
        mae_rad={name: {c: mae(name, c) for c in both} for name in result.policies},
        notes=result.notes,
        wall_s=result.wall_s,
    )


def _ranges(results: Sequence[RecordingResult], joints: JointGroup) -> FloatArray:
    """[n_joints] q99 − q01 of the reference; 0 for a joint that hardly moved."""
    rows = [row for r in results for e in r.episodes for row in e.positions]
    if not rows:
        return np.zeros(len(joints))
    low, high = np.percentile(np.array(rows, dtype=np.float64), (1, 99), axis=0)
    return np.where(high - low > MOVING_SHARE * (joints.upper - joints.lower), high - low, 0.0)


def _mean(values: FloatArray) -> Number:
    return _number(float(values.mean())) if len(values) else None


def _number(value: float) -> Number:
    return round(float(value), 6) if math.isfinite(value) else None
