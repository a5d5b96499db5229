"""The result of an evaluation in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pi05_lab.evaluation.open_loop.conditions import Condition
from pi05_lab.evaluation.open_loop.summary import (
    ConditionSummary,
    GripperSummary,
    PolicySummary,
    Summary,
)
from pi05_lab.evaluation.statistics import MIN_EPISODES

GOOD, UNSURE, BAD = "good", "unsure", "bad"
LATE_SHARE = 0.75
"""A policy closer than holding position only in a later part of the chunk gets no credit."""
_IGNORED_RAD = 0.002
"""A smaller mean action change means that an input is ignored."""


@dataclass(frozen=True)
class Verdict:
    """On one policy."""

    policy: str
    grade: str
    """"good", "unsure" or "bad"."""
    headline: str
    details: tuple[str, ...]


def verdicts(summary: Summary) -> list[Verdict]:
    """Those on all policies."""
    return [_verdict(name, policy, summary) for name, policy in summary.policies.items()]


def overview(summary: Summary) -> str:
    """What was evaluated."""
    totals = summary.totals
    text = (
        f"{_count(totals.recordings, 'recording')}, {_count(totals.episodes, 'episode')}, "
        f"{totals.duration_s:.1f} s; {_count(totals.observations, 'observation')}"
    )
    missing = totals.moments - totals.observations
    if missing:
        text += f", {_count(missing, 'inference')} without a usable observation"
    if totals.failed:
        text += f"; {_count(totals.failed, 'recording')} could not be used"
    text += "."
    for name, names in summary.trained_on.items():
        text += (
            f" {name} was trained on {len(names)} of these recordings: its figures say nothing "
            "about new situations."
        )
    return text


def _verdict(name: str, policy: PolicySummary, summary: Summary) -> Verdict:
    conditions = policy.conditions
    mine = conditions.get(Condition.POLICY)
    if mine is None or mine.mae_rad is None:
        return Verdict(name, BAD, 'Nothing could be compared: see "Dropped".', ())
    reach_s = (policy.horizon - 1) * policy.dt_s
    interval = ""
    if mine.mae_rad_95 is not None:
        low, high = mine.mae_rad_95
        interval = f" (95 % of resampled episodes: {low:.3f} to {high:.3f} rad)"
    details = [
        f"Mean error per joint over the next {reach_s:.1f} s: {_angle(mine.mae_rad)}{interval}; "
        f"holding position: {_angle(conditions[Condition.HOLD].mae_rad)}; "
        f"constant velocity: {_angle(conditions[Condition.CONSTANT_VELOCITY].mae_rad)}."
    ]
    details += _grippers(mine.gripper)
    details += _ablations(conditions)
    latency = policy.latency.stages_ms.get("total")
    if latency:
        details.append(
            f"One inference took {latency[0]:.0f} ms in the median and {latency[2]:.0f} ms at the "
            "99th percentile on this machine."
        )
    if policy.failures:
        details.append(f"{_count(policy.failures, 'inference')} failed.")
    if summary.totals.episodes < MIN_EPISODES:
        episodes = _count(summary.totals.episodes, "episode")
        details.append(f"Based on {episodes}: too few to generalise to others.")
    return Verdict(name, *_grade(policy), tuple(details))


def _grade(policy: PolicySummary) -> tuple[str, str]:
    """Against holding position: over the whole chunk, and over its far part."""
    mine, hold = policy.conditions[Condition.POLICY], policy.conditions[Condition.HOLD]
    change = mine.change
    if change is None or change.share is None:
        return UNSURE, "No joint moved in the recordings: nothing to compare."
    share, interval = change.share, change.share_95
    low, high = interval or (None, None)
    sure = low is not None and high is not None and low * high > 0
    doubt = "" if sure else " (not significant)" if interval else " (too few episodes to be sure)"
    if share < 0:
        claim = f"{-100 * share:.0f} % closer to the recording than holding position{doubt}"
        if (mine.mae_rad or 0.0) >= (policy.conditions[Condition.CONSTANT_VELOCITY].mae_rad or 0.0):
            return UNSURE, f"{claim}, but no closer than constant velocity."
        return GOOD if sure else UNSURE, f"{claim}."
    claim = f"{100 * share:.0f} % further from the recording than holding position{doubt}"
    # The first step from which all known ones are closer.
    ahead: int | None = None
    for k, (error, other) in enumerate(zip(mine.by_step_rad, hold.by_step_rad, strict=True)):
        if error is not None and other is not None:
            ahead = None if error >= other else k if ahead is None else ahead
    if ahead is not None and ahead <= LATE_SHARE * len(mine.by_step_rad):
        from_s = ahead * policy.dt_s
        return UNSURE, f"{claim}, but closer from {from_s:.1f} s ahead on: imprecise at first."
    return BAD if sure else UNSURE, f"{claim}: do not deploy."


def _grippers(gripper: GripperSummary) -> list[str]:
    real = gripper.found + gripper.missed
    if not real and not gripper.invented:
        return []
    text = (
        f"Grippers open or close {_count(gripper.changes, 'time')}; the policy finds "
        f"{gripper.changes_found} of them. By chunk, where each covering chunk counts: "
        f"{gripper.found} of {real} found, {gripper.invented} invented"
    )
    if gripper.offset_s is not None:
        when = "late" if gripper.offset_s > 0 else "early"
        text += f", {1e3 * abs(gripper.offset_s):.0f} ms too {when} on average"
    return [text + "."]


def _ablations(conditions: Mapping[str, ConditionSummary]) -> list[str]:
    found = []
    for name, what, ignored in (
        (Condition.WRONG_INSTRUCTION, "Wrong instruction", "Instruction ignored."),
        (Condition.BLACK_IMAGES, "Black images", "Images ignored."),
    ):
        condition = conditions.get(name)
        if condition is None or condition.change is None:
            continue
        moved = condition.moves_plan_rad or 0.0
        text = f"{what}: the mean action change is {_angle(moved)}"
        if condition.change.share is not None:
            text += f", the error changes by {100 * condition.change.share:+.0f} %"
        found.append(f"{text}. {ignored}" if moved < _IGNORED_RAD else f"{text}.")
    return found


def _angle(rad: float | None) -> str:
    return "–" if rad is None else f"{rad:.3f} rad ({math.degrees(rad):.1f}°)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
