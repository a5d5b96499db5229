"""`pi05 check`; faults: a checkpoint that cannot run passes, or a message without the remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_policy.tokenizer import small_config
from untrained import small_statistics  # type: ignore[import-not-found]

from pi05_ros import cli
from pi05_ros.check import check, human_bytes
from pi05_ros.policy.processing import ACTION, STATE, Normalizer, write_processing

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    """A LeRobot-style folder."""
    path = tmp_path_factory.mktemp("check") / "lerobot"
    shutil.copytree(small_folder, path)
    (path / "pi05_ros.json").unlink()
    return path


@pytest.fixture(scope="module")
def openpi(lerobot: Path) -> Path:
    """An openpi-style folder: names without `model.`, norm_stats.json, no processor files."""
    path = lerobot.parent / "openpi"
    path.mkdir()
    tensors = load_file(lerobot / "model.safetensors")
    embedding = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    del tensors[embedding]  # tied: the head's name alone is stored
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        path / "model.safetensors",
    )
    sizes = json.loads((lerobot / "config.json").read_text())["sizes"]
    config = {"action_dim": 32, "action_horizon": 50, "precision": "float32", "sizes": sizes}
    (path / "config.json").write_text(json.dumps(config | {"tokenizer_max_length": 96}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lerobot / name, path)
    (path / "assets" / "trossen").mkdir(parents=True)
    stats = {"q01": [-1.0] * 32, "q99": [1.0] * 32, "mean": [0.0] * 32, "std": [1.0] * 32}
    (path / "assets" / "trossen" / "norm_stats.json").write_text(
        json.dumps({"norm_stats": {"state": stats, "actions": stats}})
    )
    return path


@pytest.fixture
def copied(lerobot: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lerobot, tmp_path / "copied"))


def run(*arguments: str) -> int:
    return cli.main(["check", *arguments])


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return apply


def test_a_lerobot_folder(lerobot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a fact that is wrong or left out."""
    assert run(str(lerobot)) == 0
    text = capsys.readouterr().out
    for fact in (
        *("π0.5", "3,966,368", "F32", "50 steps", "20.0 ms", "QUANTILES", "LeRobot's"),
        *("state left_waist", "73 tokens for the instruction", "runs with robot aloha"),
    ):
        assert fact in text
    report = check(lerobot)
    assert report.runs and report.warnings == []
    assert report.cameras == {name: name for name in small_config().cameras}
    assert report.memory_bytes["cpu float32"] > report.memory_bytes["cpu bfloat16"]
    assert len(report.dimensions) == 28 and report.state_in_prompt is True
    assert report.conventions == []


def test_an_openpi_folder(openpi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: openpi's conventions applied without a report."""
    assert run(str(openpi), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] and facts["convention"] == "openpi" and facts["kind"] == "pi05"
    assert facts["cameras"]["base_0_rgb"] == "cam_high"
    assert "joint signs or gripper units" in facts["conventions"][0]
    assert "0, 1, 2, 3, 4, 5, 7" in facts["conventions"][1]
    assert facts["dimensions"][0]["statistics"] == {"q01": -1.0, "q99": 1.0}


@pytest.mark.parametrize(
    ("robot", "words"),
    [
        ("droid", ["velocities become positions, 0.2 a step"]),
        ("libero", ["images of image are rotated", "images of wrist_image are rotated"]),
        ("ur5e", ["actions 0, 1, 2, 3, 4, 5 are relative"]),
    ],
)
def test_other_robots_on_an_openpi_folder(openpi: Path, robot: str, words: list[str]) -> None:
    """Fault: a conversion or a masked camera that is not reported."""
    report = check(openpi, robot)
    assert report.runs, report.problems
    for word in words:
        assert any(word in line for line in report.conventions)
    assert report.warnings == ["the robot has no image for right_wrist_0_rgb: masked"]
    assert report.state_in_prompt is (robot != "libero")


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _statistics(change: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def apply(folder: Path) -> None:
        statistics = small_statistics()
        change(statistics[STATE])
        write_processing(folder, small_config(), statistics, tokenizer=".")

    return apply


def _swap(stats: dict[str, np.ndarray]) -> None:
    stats["q01"], stats["q99"] = stats["q99"], stats["q01"]


def _mode(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for step in document["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"]["STATE"] = "ROBUST"

    edit("policy_preprocessor.json", change)(folder)


def _few_joints(folder: Path) -> None:
    statistics = small_statistics()
    statistics[STATE] = {name: values[:7] for name, values in statistics[STATE].items()}
    config = replace(small_config(), state_dim=7)
    write_processing(folder, config, statistics, tokenizer=".")
    edit("config.json", lambda c: c["input_features"]["observation.state"].update(shape=[7]))(
        folder
    )


def _other_camera(document: dict[str, Any]) -> None:
    features = document["input_features"]
    features["observation.images.top"] = features.pop("observation.images.cam_high")


BIAS = "model.action_in_proj.bias"
CORRUPTIONS: dict[str, tuple[Change, str]] = {
    "truncated file": (_cut, r"model\.safetensors is not a safetensors file: .*is it cut off\?"),
    "wrong shape": (
        _tensors(lambda t: t.update({BIAS: torch.zeros(7)})),
        r"1 of another shape: action_in_proj\.bias \[7\] instead of \[128\]",
    ),
    "missing tensor": (_tensors(lambda t: t.pop(BIAS)), r"1 missing: action_in_proj\.bias"),
    "not finite": (
        _tensors(lambda t: t[BIAS].__setitem__(3, float("inf"))),
        r"1 not finite: action_in_proj\.bias.*take an earlier checkpoint",
    ),
    "swapped quantiles": (
        _statistics(_swap),
        r"observation\.state\.q99\[0\] = -0\.4\d* is below q01\[0\] = 0\.4",
    ),
    "missing camera": (
        edit("config.json", _other_camera),
        "no match for camera cam_high among the checkpoint's top",
    ),
    "more joints than the checkpoint": (
        _few_joints,
        "robot 'aloha' has state_dim 14, the checkpoint 7",
    ),
    "horizon mismatch": (
        edit("config.json", lambda c: c.update(chunk_size=10, n_action_steps=10)),
        r"config\.json: the horizon is sizes\.chunk 50 and chunk_size 10",
    ),
    "more steps executed than predicted": (
        edit("config.json", lambda c: c.update(n_action_steps=60)),
        "n_action_steps 60 is above the horizon of 50",
    ),
    "tokenizer absent": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"has no tokenizer: put tokenizer\.json and tokenizer_config\.json there",
    ),
    "unknown normalisation": (_mode, r"unknown mode 'ROBUST'; known: IDENTITY, MEAN_STD"),
    "broken JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json is not valid JSON",
    ),
    "pickle": (_pickle, "is a pickle, which can run any code.*convert it to model.safetensors"),
    "no statistics": (
        lambda folder: (folder / "policy_preprocessor.json").unlink(),
        "has no normalisation statistics",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_named(
    name: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: a damaged checkpoint passes, or its one fault is buried among others."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change, message = CORRUPTIONS[name]
    change(copied)
    assert run(str(copied), "--json") == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems[0]
    assert run(str(copied)) == 1
    assert "problem: " in capsys.readouterr().out


def test_all_faults_are_reported_at_once(copied: Path) -> None:
    """Fault: one fault per run."""
    for name in ("wrong shape", "tokenizer absent", "swapped quantiles", "missing camera"):
        CORRUPTIONS[name][0](copied)
    assert len(check(copied).problems) == 4


def test_tiny_ranges_are_a_warning(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a joint that never moved in the data turns a small deviation into thousands."""

    def still(stats: dict[str, np.ndarray]) -> None:
        stats["q99"][2] = stats["q01"][2] + 0.001

    _statistics(still)(copied)
    assert run(str(copied)) == 0
    text = capsys.readouterr().out
    assert "warning: state left_elbow: its range is 0.001, the median is 0.8" in text
    assert "narrow" in text


def test_a_prompt_without_room_is_a_warning(copied: Path) -> None:
    """Fault: every instruction is cut, and the state with it."""
    edit("config.json", lambda c: (c.update(tokenizer_max_length=30), c["sizes"].pop("toklen")))(
        copied
    )
    report = check(copied)
    assert report.runs
    assert report.warnings and "leaves 7 of 30 tokens to the instruction" in report.warnings[0]


def test_no_values_skips_the_scan_of_the_weights(copied: Path) -> None:
    """Fault: the option that saves a minute for a full-size file does nothing."""
    CORRUPTIONS["not finite"][0](copied)
    assert check(copied, values=False).runs
    assert not check(copied).runs


def test_folders_without_a_checkpoint_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a traceback."""
    assert run(str(tmp_path / "nowhere")) == 1
    assert "is not a folder here" in capsys.readouterr().out
    assert run(str(tmp_path)) == 1
    assert "no config.json in it" in capsys.readouterr().out


def test_an_unknown_robot_keeps_the_facts(lerobot: Path) -> None:
    """Fault: a typo in the robot hides all that is known of the checkpoint."""
    report = check(lerobot, "alhoa")
    assert len(report.problems) == 1 and "unknown robot 'alhoa'" in report.problems[0]
    assert report.parameters == 3_966_368 and len(report.dimensions) == 28


def test_widths_of_each_mode() -> None:
    """Fault: a standard deviation taken for a range."""
    stats = {"mean": [5.0, 0.0], "std": [0.5, 2.0], "q01": [1.0, 1.0], "q99": [2.0, 4.0]}
    assert Normalizer(ACTION, "MEAN_STD", stats, 2).widths.tolist() == [1.0, 4.0]
    assert Normalizer(ACTION, "QUANTILES", stats, 2).widths.tolist() == [1.0, 3.0]
    assert Normalizer(ACTION, "IDENTITY", stats, 2).widths.tolist() == []


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (6.5 * 2**30, "6.50 GiB")]
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text
