"""An evaluation in a few sentences, for somebody who reads nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pi05_lab.evaluation.statistics import MIN_EPISODES

GOOD, UNSURE, BAD = "good", "unsure", "bad"
LATE = 0.75
"""Share of a chunk that a policy may be worse than standing still in and have foresight."""


@dataclass(frozen=True)
class Verdict:
    """On one policy."""

    policy: str
    grade: str
    """"good", "unsure" or "bad"."""
    headline: str
    details: tuple[str, ...]


def verdicts(summary: Mapping[str, Any]) -> list[Verdict]:
    """One for each policy."""
    return [_verdict(name, figures, summary) for name, figures in summary["policies"].items()]


def overview(summary: Mapping[str, Any]) -> str:
    """What was evaluated."""
    totals = summary["totals"]
    text = (
        f"{_count(totals['recordings'], 'recording')}, {_count(totals['episodes'], 'episode')}, "
        f"{totals['duration_s']:.1f} s; {totals['observations']} observations"
    )
    missing = totals["moments"] - totals["observations"]
    if missing:
        text += f", {missing} more moments had none that could be used"
    if totals["failed"]:
        text += f"; {_count(totals['failed'], 'recording')} could not be used"
    text += "."
    trained = summary.get("trained_on", {})
    for name, names in trained.items():
        text += (
            f" {name} was trained on {len(names)} of these recordings: its figures say nothing "
            "about situations that it has not seen."
        )
    return text


def _verdict(name: str, figures: Mapping[str, Any], summary: Mapping[str, Any]) -> Verdict:
    conditions = figures["conditions"]
    if "policy" not in conditions or conditions["policy"]["mae_rad"] is None:
        return Verdict(name, BAD, "Nothing could be compared: see what was dropped.", ())
    reach_s = (figures["horizon"] - 1) * figures["dt_s"]
    mine, hold = conditions["policy"], conditions["hold"]
    grade, claim = _grade(figures)
    details = [
        f"Off by {_angle(mine['mae_rad'])} per joint on average over the next {reach_s:.1f} s"
        f"{_interval(mine['mae_rad_95'])}; standing still would be off by "
        f"{_angle(hold['mae_rad'])}, going on at the same speed by "
        f"{_angle(conditions['linear']['mae_rad'])}."
    ]
    details += _grippers(mine["gripper"])
    details += _controls(conditions)
    latency = figures["latency"]["stages_ms"].get("total")
    if latency:
        details.append(
            f"One inference took {latency[0]:.0f} ms in the median and {latency[2]:.0f} ms at the "
            "99th percentile on this machine."
        )
    if figures["failures"]:
        details.append(f"{_count(figures['failures'], 'inference')} failed.")
    if summary["totals"]["episodes"] < MIN_EPISODES:
        details.append(
            f"This is from {_count(summary['totals']['episodes'], 'episode')}: more recordings "
            "are needed to say what it does in others."
        )
    return Verdict(name, grade, claim, tuple(details))


def _grade(figures: Mapping[str, Any]) -> tuple[str, str]:
    """Against standing still: over the whole chunk, and in its far part, where a task shows."""
    conditions = figures["conditions"]
    mine, linear = conditions["policy"], conditions["linear"]
    change = mine["change"]
    if change is None or change["share"] is None:
        return UNSURE, "Nothing moved in the recordings, so there is nothing to be better at."
    share, interval = change["share"], change["share_95"]
    sure = interval is not None and None not in interval and interval[0] * interval[1] > 0
    doubt = "" if sure else " (not beyond chance)" if interval else " (too few episodes to be sure)"
    if share < 0:
        claim = f"{-100 * share:.0f} % closer to what was done than standing still{doubt}"
        if mine["mae_rad"] >= linear["mae_rad"]:
            return UNSURE, f"{claim}, but no closer than going on at the same speed."
        return GOOD if sure else UNSURE, f"{claim}."
    claim = f"{100 * share:.0f} % further from what was done than standing still{doubt}"
    ahead = _closer_from(mine["by_step_rad"], conditions["hold"]["by_step_rad"])
    if ahead is not None:
        from_s = ahead * figures["dt_s"]
        return UNSURE, f"{claim}, but closer from {from_s:.1f} s ahead on: imprecise at first."
    return BAD if sure else UNSURE, f"{claim}: not for a robot."


def _closer_from(mine: Sequence[float | None], hold: Sequence[float | None]) -> int | None:
    """The first step from which all that are known are closer; None if it is a late one."""
    ahead: int | None = None
    for k, (error, still) in enumerate(zip(mine, hold, strict=True)):
        if error is None or still is None:
            continue
        if error >= still:
            ahead = None
        elif ahead is None:
            ahead = k
    return ahead if ahead is not None and ahead <= LATE * len(mine) else None


def _grippers(gripper: Mapping[str, Any]) -> list[str]:
    real = gripper["found"] + gripper["missed"]
    if not real and not gripper["invented"]:
        return []
    text = (
        f"Grippers open or close {_count(gripper['changes'], 'time')}; the policy finds "
        f"{gripper['changes_found']} of them. By chunk, a change counts once for every chunk "
        f"in whose time it is: {gripper['found']} of {real} found, {gripper['invented']} invented"
    )
    if gripper["offset_s"] is not None:
        when = "late" if gripper["offset_s"] > 0 else "early"
        text += f", {1e3 * abs(gripper['offset_s']):.0f} ms too {when} on average"
    return [text + "."]


def _controls(conditions: Mapping[str, Any]) -> list[str]:
    found = []
    for name, what in (("shuffled", "Another instruction"), ("black", "Black pictures")):
        if name not in conditions or conditions[name]["change"] is None:
            continue
        share = conditions[name]["change"]["share"]
        text = f"{what}: its plan changes by {_angle(conditions[name].get('moves_plan_rad') or 0)}"
        if share is not None:
            text += f", its error by {100 * share:+.0f} %"
        if (conditions[name].get("moves_plan_rad") or 0) < 0.002:
            ear_or_eye = "listen" if name == "shuffled" else "look"
            text += f". It does not {ear_or_eye}"
        found.append(text + ".")
    return found


def _interval(pair: list[float] | None) -> str:
    if pair is None:
        return ""
    return f" (95 % of resampled episodes: {pair[0]:.3f} to {pair[1]:.3f} rad)"


def _angle(rad: float) -> str:
    return f"{rad:.3f} rad ({math.degrees(rad):.1f}°)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
