"""Faults pinned: a verdict that contradicts its figures, or is surer than the episodes allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pi05_lab.evaluation.open_loop.summary import (
    Change,
    ConditionSummary,
    GripperSummary,
    LatencySummary,
    PolicySummary,
    Summary,
    Totals,
)
from pi05_lab.evaluation.open_loop.verdict import BAD, GOOD, UNSURE, overview, verdicts

STEPS = 8
GRIPPER = GripperSummary(0, 0, 0, 0, 0, None, None, None)


def condition(
    error: float, change: Change | None = None, moves_plan_rad: float | None = None
) -> ConditionSummary:
    by_step: list[float | None] = [error] * STEPS
    return ConditionSummary(
        1, error, None, None, None, by_step, "hold", change, GRIPPER, moves_plan_rad
    )


def summary(
    share: float | None,
    interval: list[float | None] | None,
    linear: float = 1.0,
    by_step: list[float | None] | None = None,
    ablations: dict[str, ConditionSummary] | None = None,
) -> Summary:
    mine = condition(0.1 * (1 + (share or 0.0)), None if share is None else Change(share, interval))
    if by_step is not None:
        mine = replace(mine, by_step_rad=by_step)
    conditions = {"policy": mine, "hold": condition(0.1), "linear": condition(linear)}
    conditions |= ablations or {}
    latency = LatencySummary({}, None)
    policy = PolicySummary("a policy", STEPS, 0.1, 60, 0, 0, conditions, {}, {}, latency)
    totals = Totals(1, 1, 7, 12.0, 62, 60)
    return Summary({}, totals, {}, [], {"it": policy}, {}, [], {}, {}, [])


@pytest.mark.parametrize(
    ("share", "interval", "linear", "grade", "words"),
    [
        (-0.5, [-0.7, -0.2], 1.0, GOOD, "50 % closer to the recording than holding position."),
        (-0.5, [-0.7, 0.2], 1.0, UNSURE, "(not significant)"),
        (-0.5, [-0.7, -0.2], 0.04, UNSURE, "no closer than constant velocity"),
        (-0.5, None, 1.0, UNSURE, "(too few episodes to be sure)"),
        (0.4, None, 1.0, UNSURE, "(too few episodes to be sure)"),
        (0.4, [0.1, 0.7], 1.0, BAD, "40 % further from the recording than holding position: do"),
        (0.4, [-0.1, 0.7], 1.0, UNSURE, "(not significant)"),
        (None, None, 1.0, UNSURE, "No joint moved"),
    ],
)
def test_the_grade_follows_from_the_figures(
    share: float | None, interval: list[float | None] | None, linear: float, grade: str, words: str
) -> None:
    (found,) = verdicts(summary(share, interval, linear))
    assert found.grade == grade and words in found.headline


@pytest.mark.parametrize(
    ("steps", "grade", "words"),
    [
        ([0.3] * 3 + [0.05] * 5, UNSURE, "but closer from 0.3 s ahead on"),
        ([0.3] * 3 + [None] + [0.05] * 4, UNSURE, "but closer from 0.4 s ahead on"),
        ([0.3] * 3 + [0.05] * 4 + [0.3], BAD, "do not deploy"),
        ([0.3] * 7 + [0.05], BAD, "do not deploy"),
    ],
)
def test_foresight_counts_after_an_imprecise_beginning(
    steps: list[float | None], grade: str, words: str
) -> None:
    """Holding position is hard to beat for the first tenths of a second."""
    (found,) = verdicts(summary(0.4, [0.1, 0.7], by_step=steps))
    assert found.grade == grade and words in found.headline


def test_ignored_inputs_are_named() -> None:
    unchanged = condition(0.1, Change(0.0, None), 0.0)
    ablations = {"shuffled": unchanged, "black": unchanged}
    (found,) = verdicts(summary(-0.5, [-0.7, -0.2], ablations=ablations))
    assert "Instruction ignored." in " ".join(found.details)
    assert "Images ignored." in " ".join(found.details)


def test_training_episodes_are_reported() -> None:
    """Else figures on the data of the training look like those of new situations."""
    found = replace(summary(-0.5, None), trained_on={"it": ["data#0", "data#3"]})
    assert "it was trained on 2 of these recordings" in overview(found)


def test_recordings_without_a_comparison_are_reported() -> None:
    empty = summary(-0.5, None)
    empty.policies["it"].conditions.clear()
    (found,) = verdicts(empty)
    assert found.grade == BAD and "Nothing could be compared" in found.headline
    assert overview(empty) == (
        "1 recording, 7 episodes, 12.0 s; 60 observations, 2 inferences without a usable "
        "observation; 1 recording could not be used."
    )
