"""The figures of all recordings together: what metrics.json holds and the report shows.

Errors are those of a chunk's step k against what was recorded at t + k·dt, means over joints are
over the arms' joints (rad), without grippers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pi05_lab.evaluation.open_loop.metrics import gripper_f1
from pi05_lab.evaluation.open_loop.series import percentiles, rounded
from pi05_lab.evaluation.statistics import bootstrap_interval
from pi05_ros.types import FloatArray, JointGroup

Result = Mapping[str, Any]

STANDING = 0.01
"""Share of its limits that a joint has to move to count as moving."""
BASELINES = ("hold", "linear", "random")
_REFERENCES = {"shuffled": "plain", "black": "plain", "plain": "plain"}
"""What a condition is compared with, on the same observations; the others with `hold`."""
SHOWN = ("policy", *BASELINES, "plain", "shuffled", "black")


def summarize(
    results: Sequence[Result],
    failed: Mapping[str, str],
    joints: JointGroup,
    settings: Mapping[str, Any],
    trained_on: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Put the recordings' results together.

    Args:
        results: of `OfflineEvaluation.run`, in the order of the report.
        failed: recording → why it has no result.
        joints: of the robot.
        settings: shown as they are.
        trained_on: policy → the recordings that it was trained on.
    """
    ranges = _ranges(results, joints)
    names = list(dict.fromkeys(name for result in results for name in result["policies"]))
    return {
        "settings": dict(settings),
        "totals": {
            "recordings": len(results),
            "failed": len(failed),
            "episodes": sum(len(result["episodes"]) for result in results),
            "duration_s": round(sum(result["duration_s"] for result in results), 3),
            "moments": sum(result["moments"] for result in results),
            "observations": sum(result["observations"] for result in results),
        },
        "ranges": {name: _number(value) for name, value in zip(joints.names, ranges, strict=True)},
        "commanded_joints": sorted({name for r in results for name in r["commanded_joints"]}),
        "policies": {name: _policy(name, results, joints, ranges) for name in names},
        "recorded_motion": _motion(
            [window for r in results for e in r["episodes"] for window in e["recorded_windows"]]
        ),
        "recordings": [_recording(result) for result in results],
        "failed": dict(failed),
        "trained_on": {name: list(own) for name, own in (trained_on or {}).items() if own},
        "dropped": _dropped(results),
    }


def _policy(
    name: str, results: Sequence[Result], joints: JointGroup, ranges: FloatArray
) -> dict[str, Any]:
    mine = [result["policies"][name] for result in results if name in result["policies"]]
    episodes = [
        episode["tracks"][name]
        for result in results
        for episode in result["episodes"]
        if name in episode["tracks"]
    ]
    found = {condition for episode in episodes for condition in episode["errors"]}
    conditions = [c for c in SHOWN if c in found] + sorted(found - set(SHOWN))
    arm = ~joints.gripper if (~joints.gripper).any() else np.ones(len(joints), dtype=bool)
    figures = {
        condition: _condition(
            [e["errors"][condition] for e in episodes if condition in e["errors"]], arm, ranges
        )
        for condition in conditions
    }
    for condition, figure in figures.items():
        pairs = [e["errors"] for e in episodes if condition in e["errors"]]
        against = _REFERENCES.get(condition.partition(":")[0], "hold")
        figure["against"] = against
        figure["change"] = _change(pairs, condition, against, arm)
        figure["gripper"] = _gripper(
            [e["grippers"][condition] for e in episodes if condition in e["grippers"]]
        )
        shifts = [e["shifts"][condition] for e in episodes if condition in e["shifts"]]
        count = sum(each[1] for each in shifts)
        if count:
            figure["moves_plan_rad"] = _number(sum(each[0] for each in shifts) / count)
    return {
        "description": mine[0]["description"],
        "horizon": mine[0]["horizon"],
        "dt_s": mine[0]["dt_s"],
        "inferences": sum(each["inferences"] for each in mine),
        "failures": sum(each["failures"] for each in mine),
        "unscored": sum(each["unscored"] for each in mine),
        "conditions": figures,
        "joints": _by_joint(episodes, joints, ranges),
        "schedulers": _schedulers(mine, episodes, arm),
        "latency": _latency(mine),
    }


def _condition(sums: Sequence[Result], arm: Any, ranges: FloatArray) -> dict[str, Any]:
    absolute = np.array([each["by_joint"] for each in sums])
    squared = np.array([each["squared_by_joint"] for each in sums])
    steps = np.array([sum(each["steps"]) for each in sums])
    total = max(1, int(steps.sum()))
    by_joint = absolute.sum(axis=0) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(ranges > 0, by_joint / ranges, np.nan)[arm]
    by_step = np.array([each["by_step"] for each in sums]).sum(axis=0)
    step_counts = np.array([each["steps"] for each in sums]).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        course = by_step / np.where(step_counts > 0, step_counts, np.nan)
    interval = bootstrap_interval(absolute[:, arm].mean(axis=1).tolist(), steps.tolist())
    return {
        "chunks": sum(each["chunks"] for each in sums),
        "mae_rad": _number(by_joint[arm].mean()),
        "mae_rad_95": _pair(interval),
        "rmse_rad": _number(math.sqrt(float((squared.sum(axis=0) / total)[arm].mean()))),
        "mae_share": _number(_mean(share)),
        "by_step_rad": rounded(course, 6),
    }


def _change(
    pairs: Sequence[Result], condition: str, against: str, arm: Any
) -> dict[str, Any] | None:
    """How much larger the error is than that of another condition, as a share of it."""
    both = [pair for pair in pairs if against in pair]
    if condition == against or not both:
        return None
    mine = [float(np.array(pair[condition]["by_joint"])[arm].mean()) for pair in both]
    theirs = [float(np.array(pair[against]["by_joint"])[arm].mean()) for pair in both]
    if sum(theirs) <= 0:
        return None
    interval = bootstrap_interval(mine, theirs)
    return {
        "share": _number(sum(mine) / sum(theirs) - 1),
        "share_95": _pair(None if interval is None else (interval[0] - 1, interval[1] - 1)),
    }


def _gripper(tallies: Sequence[Result]) -> dict[str, Any]:
    counted = ("found", "missed", "invented", "changes", "changes_found")
    found, missed, invented, changes, changes_found = (
        sum(each[key] for each in tallies) for key in counted
    )
    offsets = [value for each in tallies for value in each["offsets_s"]]
    return {
        "found": found,
        "missed": missed,
        "invented": invented,
        "changes": changes,
        "changes_found": changes_found,
        "f1": _number(gripper_f1(found, missed, invented)),
        "offset_s": _number(float(np.mean(offsets))) if offsets else None,
        "offset_abs_s": _number(float(np.mean(np.abs(offsets)))) if offsets else None,
    }


def _by_joint(
    episodes: Sequence[Result], joints: JointGroup, ranges: FloatArray
) -> dict[str, dict[str, Any]]:
    table = {}
    sums: dict[str, FloatArray] = {}
    for condition in ("policy", "hold"):
        errors = [e["errors"][condition] for e in episodes if condition in e["errors"]]
        steps = max(1, sum(sum(each["steps"]) for each in errors))
        for key in ("by_joint", "squared_by_joint"):
            total = np.array([each[key] for each in errors]).sum(axis=0)
            sums[f"{condition} {key}"] = total / steps if errors else np.full(len(joints), np.nan)
    for k, name in enumerate(joints.names):
        mae = float(sums["policy by_joint"][k])
        table[name] = {
            "unit": "m" if joints.gripper[k] and joints.upper[k] < 0.5 else "rad",
            "range": _number(ranges[k]),
            "mae": _number(mae),
            "rmse": _number(math.sqrt(max(0.0, float(sums["policy squared_by_joint"][k])))),
            "mae_share": _number(mae / ranges[k]) if ranges[k] > 0 else None,
            "hold_mae": _number(sums["hold by_joint"][k]),
        }
    return table


def _schedulers(
    mine: Sequence[Result], episodes: Sequence[Result], arm: Any
) -> dict[str, dict[str, Any]]:
    table = {}
    for method in dict.fromkeys(name for each in mine for name in each["schedulers"]):
        players = [each["schedulers"][method] for each in mine if method in each["schedulers"]]
        executed = [e["executed"][method] for e in episodes if method in e["executed"]]
        ticks = sum(player["ticks"] for player in players)
        compared = sum(each["ticks"] for each in executed)
        absolute = np.array([each["by_joint"] for each in executed]).sum(axis=0)
        seams = [value for player in players for value in player["seams_rad"]]
        maxima = [player["seam_max_rad"] for player in players]
        largest = [max(known)] if (known := [m for m in maxima if m is not None]) else []
        clamps = {
            kind: _number(
                sum(sum(player["clamps"][kind]) for player in players) / (ticks * len(arm))
            )
            for kind in ("position", "velocity", "acceleration", "held")
            if ticks
        }
        chunks: dict[str, int] = {}
        for player in players:
            for key, value in player["chunks"].items():
                chunks[key] = chunks.get(key, 0) + value
        table[method] = {
            "executed_mae_rad": _number(absolute[arm].mean() / compared) if compared else None,
            "seam_rad": rounded([*percentiles(seams, (50, 95)), *largest], 6),
            **_motion([window for each in executed for window in each["windows"]]),
            "clamped": clamps,
            "ticks": ticks,
            "chunks": chunks,
        }
    return table


def _motion(windows: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Means over the windows in which something moves, weighted with their durations."""
    found: dict[str, Any] = {}
    for k, name in enumerate(("rms_jerk", "ldlj", "sparc"), start=1):
        known = [(w[0], w[k]) for w in windows if w[k] is not None]
        weight = sum(float(duration or 0.0) for duration, _ in known)
        total = sum(float(duration or 0.0) * float(value or 0.0) for duration, value in known)
        found[name] = _number(total / weight) if weight else None
    return found


def _latency(mine: Sequence[Result]) -> dict[str, Any]:
    stages: dict[str, list[float]] = {}
    for each in mine:
        for stage, samples in each["stages_s"].items():
            stages.setdefault(stage, []).extend(samples)
    slow = [each["slower_than_delay"] for each in mine if each["slower_than_delay"] is not None]
    return {
        "stages_ms": {
            stage: rounded([1e3 * value for value in percentiles(samples)], 3)
            for stage, samples in stages.items()
        },
        "slower_than_delay": sum(slow) if slow else None,
    }


def _recording(result: Result) -> dict[str, Any]:
    policies = {}
    for name in result["policies"]:
        errors = [e["tracks"][name]["errors"] for e in result["episodes"] if name in e["tracks"]]
        policies[name] = {
            condition: _arm_mae([each[condition] for each in errors if condition in each])
            for condition in ("policy", "hold")
        }
    kept = ("name", "duration_s", "moments", "observations", "skew_ms", "age_ms", "streams")
    return {
        **{key: result[key] for key in kept},
        "instructions": [episode["instruction"] for episode in result["episodes"]],
        "mae_rad": policies,
        "notes": result["notes"],
        "wall_s": result["wall_s"],
    }


def _arm_mae(sums: Sequence[Result]) -> float | None:
    steps = sum(sum(each["steps"]) for each in sums)
    total = sum(sum(each["by_step"]) for each in sums)
    return _number(total / steps) if steps else None


def _dropped(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [{"recording": result["name"], **note} for result in results for note in result["notes"]]


def _ranges(results: Sequence[Result], joints: JointGroup) -> FloatArray:
    """[n_joints] q99 − q01 of what was recorded; 0 for a joint that stood."""
    rows = [row for r in results for e in r["episodes"] for row in e["positions"]]
    if not rows:
        return np.zeros(len(joints))
    low, high = np.percentile(np.array(rows, dtype=np.float64), (1, 99), axis=0)
    return np.where(high - low > STANDING * (joints.upper - joints.lower), high - low, 0.0)


def _mean(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _pair(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [_number(interval[0]), _number(interval[1])]
