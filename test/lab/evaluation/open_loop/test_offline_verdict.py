"""Faults pinned: a verdict that contradicts its figures, or is surer than the episodes allow."""

from __future__ import annotations

from typing import Any

import pytest

from pi05_lab.evaluation.open_loop.verdict import BAD, GOOD, UNSURE, overview, verdicts

STEPS = 8
GRIPPER = {"found": 0, "missed": 0, "invented": 0, "f1": None, "offset_s": None}


def condition(error: float, change: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "mae_rad": error,
        "mae_rad_95": None,
        "change": change,
        "gripper": GRIPPER,
        "by_step_rad": [error] * STEPS,
        **more,
    }


def summary(
    share: float | None,
    interval: list[float] | None,
    linear: float = 1.0,
    policy: list[float | None] | None = None,
    controls: dict[str, Any] | None = None,
) -> dict[str, Any]:
    error = 0.1 * (1 + (share or 0.0))
    change = None if share is None else {"share": share, "share_95": interval}
    mine = condition(error, change)
    if policy is not None:
        mine["by_step_rad"] = policy
    figures = {"policy": mine, "hold": condition(0.1), "linear": condition(linear)}
    return {
        "totals": {
            "recordings": 1, "episodes": 7, "duration_s": 12.0, "observations": 60,
            "moments": 62, "failed": 1,
        },
        "policies": {
            "it": {
                "conditions": {**figures, **(controls or {})},
                "horizon": STEPS, "dt_s": 0.1, "failures": 0, "latency": {"stages_ms": {}},
            }
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("share", "interval", "linear", "grade", "words"),
    [
        (-0.5, [-0.7, -0.2], 1.0, GOOD, "50 % closer to what was done than standing still."),
        (-0.5, [-0.7, 0.2], 1.0, UNSURE, "(not beyond chance)"),
        (-0.5, [-0.7, -0.2], 0.04, UNSURE, "no closer than going on at the same speed"),
        (-0.5, None, 1.0, UNSURE, "(too few episodes to be sure)"),
        (0.4, None, 1.0, UNSURE, "(too few episodes to be sure)"),
        (0.4, [0.1, 0.7], 1.0, BAD, "40 % further from what was done than standing still: not"),
        (0.4, [-0.1, 0.7], 1.0, UNSURE, "(not beyond chance)"),
        (None, None, 1.0, UNSURE, "Nothing moved"),
    ],
)
def test_the_grade_follows_from_the_figures(
    share: float | None, interval: list[float] | None, linear: float, grade: str, words: str
) -> None:
    (found,) = verdicts(summary(share, interval, linear))
    assert found.grade == grade and words in found.headline


@pytest.mark.parametrize(
    ("steps", "grade", "words"),
    [
        ([0.3] * 3 + [0.05] * 5, UNSURE, "but closer from 0.3 s ahead on"),
        ([0.3] * 3 + [None] + [0.05] * 4, UNSURE, "but closer from 0.4 s ahead on"),
        ([0.3] * 3 + [0.05] * 4 + [0.3], BAD, "not for a robot"),
        ([0.3] * 7 + [0.05], BAD, "not for a robot"),
    ],
)
def test_foresight_is_seen_behind_an_imprecise_beginning(
    steps: list[float | None], grade: str, words: str
) -> None:
    """Standing still is hard to beat for the first tenths of a second."""
    (found,) = verdicts(summary(0.4, [0.1, 0.7], policy=steps))
    assert found.grade == grade and words in found.headline


def test_a_policy_that_neither_listens_nor_looks_is_called_so() -> None:
    change = {"share": 0.0, "share_95": None}
    deaf = {name: condition(0.1, change, moves_plan_rad=0.0) for name in ("shuffled", "black")}
    (found,) = verdicts(summary(-0.5, [-0.7, -0.2], controls=deaf))
    assert "It does not listen." in " ".join(found.details)
    assert "It does not look." in " ".join(found.details)


def test_training_episodes_are_said_to_be() -> None:
    """Else figures on the data of the training look like those of new situations."""
    found = {**summary(-0.5, None), "trained_on": {"it": ["data#0", "data#3"]}}
    assert "it was trained on 2 of these recordings" in overview(found)


def test_nothing_to_compare_and_what_was_left_out_are_said() -> None:
    empty = summary(-0.5, None)
    empty["policies"]["it"]["conditions"] = {}
    (found,) = verdicts(empty)
    assert found.grade == BAD and "Nothing could be compared" in found.headline
    assert overview(empty) == (
        "1 recording, 7 episodes, 12.0 s; 60 observations, 2 more moments had none that could be "
        "used; 1 recording could not be used."
    )
