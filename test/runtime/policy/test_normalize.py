"""Scaling by statistics; faults: another stack's epsilon, clipping, statistics that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pi05_ros.policy.processing import STATISTICS, Convention, Mode, Normalizer
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "processing"
GOLDENS = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
MODES = {"pi05": Mode.QUANTILES, "pi0": Mode.MEAN_STD}
STATE_FILES = {
    "pi05": "policy_preprocessor_step_3_normalizer_processor.safetensors",
    "pi0": "policy_preprocessor_step_6_normalizer_processor.safetensors",
}


def golden_normalizer(kind: str, feature: str) -> Normalizer:
    tensors = load_file(DATA / f"processor_{kind}" / STATE_FILES[kind])
    stats = {
        key.removeprefix(f"{feature}."): value
        for key, value in tensors.items()
        if key.startswith(f"{feature}.")
    }
    return Normalizer(feature, MODES[kind], stats, 14)


@pytest.mark.parametrize("case", GOLDENS["cases"])
def test_normalises_as_lerobot(case: dict[str, Any]) -> None:
    """Fault: a dimension with q01 = q99, or a value outside the quantiles, scaled otherwise."""
    got = golden_normalizer(case["policy"], "observation.state").normalize(case["state"])
    np.testing.assert_allclose(got, case["normalised"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_unnormalises_as_lerobot_without_clipping(kind: str) -> None:
    """Fault: outputs clipped to [-1, 1] first; the reference's go up to 2.1."""
    post = GOLDENS["post"][kind]
    got = golden_normalizer(kind, "action").unnormalize(post["model_out"])
    np.testing.assert_allclose(got, post["unnormalised"], rtol=1e-6, atol=1e-6)
    assert np.abs(post["model_out"]).max() > 1.5


def test_openpi_formulas() -> None:
    """Fault: LeRobot's formula for an openpi checkpoint. Expected numbers worked out by hand."""
    narrow = Normalizer("state", "QUANTILES", {"q01": [1.0], "q99": [1.0]}, 1, "openpi")
    assert narrow.normalize([1.000001])[0] == pytest.approx(1.0)
    assert narrow.unnormalize([3.0])[0] == pytest.approx(1.000002, abs=1e-12)
    spread = Normalizer("actions", "MEAN_STD", {"mean": [2.0], "std": [0.0]}, 1, "openpi")
    assert spread.normalize([2.000003])[0] == pytest.approx(3.0)
    assert spread.unnormalize([3.0])[0] == pytest.approx(2.000003, abs=1e-12)


def test_lerobot_epsilon_replaces_only_a_zero_width() -> None:
    """Fault: eps added to every width, which shifts narrow joints."""
    stats = {"q01": [0.0, 0.0], "q99": [0.0, 1e-6]}
    got = Normalizer("s", "QUANTILES", stats, 2).normalize([1e-8, 1e-6])
    np.testing.assert_allclose(got, [1.0, 1.0], rtol=1e-6)
    mean_std = Normalizer("s", "MEAN_STD", {"mean": [0.0], "std": [0.0]}, 1)
    assert mean_std.unnormalize([5.0])[0] == 0.0  # no eps on the way back


def test_openpi_statistics_are_cut_to_the_robot() -> None:
    """Fault: the base models' 32 values rejected for a robot of fewer joints."""
    stats = {"q01": [0.0] * 32, "q99": [2.0] * 32}
    np.testing.assert_allclose(
        Normalizer("state", "QUANTILES", stats, 3, "openpi").normalize([0, 1, 2]),
        [-1, 0, 1],
        atol=1e-5,
    )


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("convention", ["lerobot", "openpi"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_back_and_forth_is_the_same(
    mode: Mode, convention: Convention, data: st.DataObject
) -> None:
    """Fault: a direction that clips, or whose formula is not the other's inverse."""
    low = np.array(data.draw(st.lists(st.floats(-3, 3), min_size=4, max_size=4)))
    width = np.array(data.draw(st.lists(st.floats(0.05, 4), min_size=4, max_size=4)))
    x = np.array(data.draw(st.lists(st.floats(-20, 20), min_size=8, max_size=8))).reshape(2, 4)
    names = STATISTICS[mode]
    second = width if mode is Mode.MEAN_STD else low + width
    normalizer = Normalizer("f", mode, dict(zip(names, (low, second), strict=False)), 4, convention)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(x)), x, atol=1e-4)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"q01": [0, 0]}, r"action has no q99.*QUANTILES.*there: q01"),
        ({"q01": [0, 0], "q99": None}, r"action has no q99"),
        ({"q01": [0, 0], "q99": [1, float("nan")]}, r"action\.q99\[1\] is nan"),
        ({"q01": [0, float("-inf")], "q99": [1, 1]}, r"action\.q01\[1\] is -inf"),
        ({"q01": [0, 2], "q99": [1, 1]}, r"action\.q99\[1\] = 1\.0 is below q01\[1\] = 2\.0"),
        ({"q01": [0], "q99": [1]}, r"action\.q01 has shape \[1\], the robot needs 2"),
        ({"q01": [0] * 3, "q99": [1] * 3}, r"action\.q01 has shape \[3\], the robot needs 2"),
        ({"q01": 0, "q99": 1}, r"action\.q01 has shape \[\]"),
        ({"q01": ["a", "b"], "q99": [1, 1]}, r"action\.q01 must be a list of numbers"),
    ],
)
def test_bad_statistics_are_named(statistics: dict[str, Any], message: str) -> None:
    """Fault: a joint silently driven by a broken or shifted scale."""
    with pytest.raises(CheckpointError, match=message):
        Normalizer("action", "QUANTILES", statistics, 2)


def test_unknown_mode_and_negative_std_are_named() -> None:
    """Fault: a later LeRobot's mode taken for one of these."""
    with pytest.raises(CheckpointError, match="unknown mode 'ROBUST'"):
        Normalizer("action", "ROBUST", {}, 2)
    with pytest.raises(CheckpointError, match=r"action\.std\[1\] is negative"):
        Normalizer("action", "MEAN_STD", {"mean": [0, 0], "std": [1, -1]}, 2)


def test_values_of_the_wrong_length_are_refused() -> None:
    """Fault: numpy's broadcasting spreads one value over all joints."""
    normalizer = Normalizer("action", "QUANTILES", {"q01": [0, 0], "q99": [1, 1]}, 2)
    for wrong in ([1.0], 1.0, [[1.0]]):
        with pytest.raises(ValueError, match="action needs 2 values"):
            normalizer.unnormalize(wrong)
