"""Scaling and processing files; faults: another code base's formula, a step or file left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pi05_ros.policy.config import PolicyConfig, parse_config
from pi05_ros.policy.processing import (
    ACTION,
    STATE,
    STATISTICS,
    Convention,
    Mode,
    Normalizer,
    Processing,
    read_processing,
    write_processing,
)
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "processing"
GOLDENS = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
RANGE = {"q01": [0.0] * 14, "q99": [1.0] * 14, "mean": [0.0] * 14, "std": [1.0] * 14}
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
def test_unnormalize_inverts_normalize(
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


def config(kind: str) -> PolicyConfig:
    default = parse_config({"type": kind}, kind)
    return replace(default, cameras=("base_0_rgb",), state_dim=14, action_dim=14)


def read(directory: Path, kind: str = "pi05") -> Processing:
    return read_processing(directory, config(kind), 14, 14)


def edited(tmp_path: Path, edit: Any, name: str = "policy_preprocessor.json") -> Path:
    """A copy of LeRobot's π0.5 files with one pipeline changed."""
    target = tmp_path / "checkpoint"
    shutil.copytree(DATA / "processor_pi05", target)
    document = json.loads((target / name).read_text())
    edit(document)
    (target / name).write_text(json.dumps(document))
    return target


def step(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in document["steps"] if s["registry_name"] == name)


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_reads_lerobots_files(kind: str) -> None:
    """Fault: the state file searched by a fixed step number, which differs between the two."""
    processing = read(DATA / f"processor_{kind}", kind)
    assert processing.convention == "lerobot"
    assert processing.state.mode is (Mode.QUANTILES if kind == "pi05" else Mode.MEAN_STD)
    assert processing.delta_mask is None
    case = next(c for c in GOLDENS["cases"] if c["policy"] == kind)
    np.testing.assert_allclose(
        processing.state.normalize(case["state"]), case["normalised"], rtol=1e-6, atol=1e-6
    )
    post = GOLDENS["post"][kind]
    np.testing.assert_allclose(
        processing.action.unnormalize(post["model_out"]), post["unnormalised"], atol=1e-6
    )


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_writes_what_lerobot_writes(kind: str, tmp_path: Path) -> None:
    """Fault: files that LeRobot does not load. Compared with those it saved itself."""
    reference = DATA / f"processor_{kind}"
    statistics: dict[str, dict[str, np.ndarray]] = {STATE: {}, ACTION: {}}
    tensors = load_file(next(reference.glob("*_normalizer_processor.safetensors")))
    for key, value in tensors.items():
        feature, name = key.rsplit(".", 1)
        statistics[feature][name] = value
    write_processing(tmp_path, config(kind), statistics)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in reference.iterdir()}
    for path in reference.iterdir():
        if path.suffix == ".json":
            assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())
        else:
            written = load_file(tmp_path / path.name)
            assert written.keys() == load_file(path).keys()
            for key, value in load_file(path).items():
                np.testing.assert_array_equal(written[key], value)


@pytest.mark.parametrize("name", ["relative_actions_processor", "delta_actions_processor"])
def test_lerobots_relative_actions(name: str, tmp_path: Path) -> None:
    """Fault: relative actions sent to the robot as if they were absolute (both step names)."""

    def edit(document: dict[str, Any]) -> None:
        relative = step(document, "relative_actions_processor")
        relative["registry_name"] = name
        names = [f"joint_{i}" for i in range(6)] + ["left_Gripper"]
        relative["config"] = {
            "enabled": True,
            "exclude_joints": ["gripper"],
            "action_names": names,
        }

    mask = read(edited(tmp_path, edit)).delta_mask
    assert mask == (*[True] * 6, False, *[True] * 7)


@pytest.mark.parametrize("mask", [(True,) * 6 + (False,), (False, True), (True, True), (False,)])
def test_relative_actions_are_written_as_lerobot_reads_them(
    mask: tuple[bool, ...], tmp_path: Path
) -> None:
    """Fault: a checkpoint trained on relative actions whose files call them absolute."""
    small = replace(config("pi05"), state_dim=len(mask), action_dim=len(mask))
    values = {name: np.arange(len(mask)) + (name == "q99") for name in ("q01", "q99")}
    write_processing(tmp_path, small, {STATE: values, ACTION: values}, delta_mask=mask)
    assert read_processing(tmp_path, small, len(mask), len(mask)).delta_mask == mask
    post = json.loads((tmp_path / "policy_postprocessor.json").read_text())
    absolute = step(post, "absolute_actions_processor")
    assert absolute["config"] == {"enabled": True}


def test_rename_map(tmp_path: Path) -> None:
    """Fault: the data's camera names are unknown."""

    def edit(document: dict[str, Any]) -> None:
        step(document, "rename_observations_processor")["config"]["rename_map"] = {
            "observation.images.top": "observation.images.base_0_rgb"
        }

    assert read(edited(tmp_path, edit)).rename == {"top": "base_0_rgb"}


def test_the_mode_comes_from_the_file(tmp_path: Path) -> None:
    """Fault: QUANTILES assumed for π0.5; a published LIBERO fine-tune uses MEAN_STD."""

    def edit(document: dict[str, Any]) -> None:
        step(document, "normalizer_processor")["config"]["norm_map"]["STATE"] = "MEAN_STD"

    processing = read(edited(tmp_path, edit))
    assert processing.state.mode is Mode.MEAN_STD
    assert processing.action.mode is Mode.QUANTILES


def _no_state_file(document: dict[str, Any]) -> None:
    del step(document, "normalizer_processor")["state_file"]


def _path_as_state_file(document: dict[str, Any]) -> None:
    step(document, "normalizer_processor")["state_file"] = "../elsewhere.safetensors"


def _missing_state_file(document: dict[str, Any]) -> None:
    step(document, "normalizer_processor")["state_file"] = "gone.safetensors"


def _no_normalizer(document: dict[str, Any]) -> None:
    document["steps"].remove(step(document, "normalizer_processor"))


def _unknown_step(document: dict[str, Any]) -> None:
    document["steps"].append({"registry_name": "flip_images", "config": {}})


def _scaled_images(document: dict[str, Any]) -> None:
    step(document, "normalizer_processor")["config"]["norm_map"]["VISUAL"] = "MEAN_STD"


def _no_steps(document: dict[str, Any]) -> None:
    del document["steps"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_no_state_file, "normalizer_processor has no state_file"),
        (_path_as_state_file, "is no file name"),
        (_missing_state_file, r"gone\.safetensors cannot be read"),
        (_no_normalizer, "no step 'normalizer_processor'"),
        (_unknown_step, "step 'flip_images' is not known"),
        (_scaled_images, "scales images by MEAN_STD"),
        (_no_steps, "has no list of steps"),
    ],
)
def test_bad_pipelines_are_named(edit: Any, message: str, tmp_path: Path) -> None:
    """Fault: actions without their statistics, or data without a step's effect."""
    with pytest.raises(CheckpointError, match=message):
        read(edited(tmp_path, edit))


def test_a_missing_postprocessor_is_named(tmp_path: Path) -> None:
    """Fault: normalised actions sent to the robot."""
    target = edited(tmp_path, lambda document: None)
    (target / "policy_postprocessor.json").unlink()
    with pytest.raises(CheckpointError, match=r"no policy_postprocessor\.json"):
        read(target)


@pytest.mark.parametrize("place", ["norm_stats.json", "assets/a/b/norm_stats.json"])
@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_reads_openpis_norm_stats(kind: str, place: str, tmp_path: Path) -> None:
    """Fault: the mode is not in openpi's file, it follows from the kind of model."""
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": {"state": RANGE, "actions": RANGE}}))
    processing = read(tmp_path, kind)
    assert processing.convention == "openpi"
    middle = processing.state.normalize(np.full(14, 0.5))
    np.testing.assert_allclose(middle, 0.0 if kind == "pi05" else 0.5, atol=1e-5)


def test_openpi_faults_are_named(tmp_path: Path) -> None:
    """Fault: the wrong robot's statistics picked out of several, or half a file accepted."""
    with pytest.raises(CheckpointError, match="has no normalisation statistics"):
        read(tmp_path)
    for robot in ("trossen", "droid"):
        (tmp_path / "assets" / robot).mkdir(parents=True)
        (tmp_path / "assets" / robot / "norm_stats.json").write_text(
            json.dumps({"norm_stats": {"state": RANGE}})
        )
    with pytest.raises(CheckpointError, match="several norm_stats"):
        read(tmp_path)
    shutil.rmtree(tmp_path / "assets" / "droid")
    with pytest.raises(CheckpointError, match="has no 'actions'"):
        read(tmp_path)
