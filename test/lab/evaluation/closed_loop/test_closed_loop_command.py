"""Faults pinned: a report without header, ablations or episodes; errors that end in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from pi05_lab.evaluation.closed_loop.report import LABEL_WIDTH, STRIP, TILE
from pi05_ros.cli import main

ALOHA = str(Path(__file__).parents[4] / "config" / "aloha.yaml")


def run(*arguments: str) -> int:
    return main(["sim-eval", *arguments, "--params-file", ALOHA])


def test_a_run_writes_figures_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--checkpoint expert --tasks touch home --colors red --arms left --episodes 1 --seed 3"
    )
    options += " --delay-ms 160 --replan 8 --scheduler latest --controls --limit-s 4"
    assert run(*options.split(), "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    for word in ("latest", "every 8 ticks", "touch", "100 (21–100)", "wrong instruction", "vision"):
        assert word in printed, word
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    header = metrics["header"]
    assert (header["scheduler"], header["delay_ms"], header["seed"]) == ("latest", 160, 3)
    assert metrics["verbs"]["touch"]["success"]["wilson_95"] == pytest.approx([0.2065, 1], abs=1e-3)
    assert set(metrics["controls"]["shuffled"]) == {"touch", "home"}
    assert set(metrics["controls"]["black"]) == {"touch"}
    assert [(e["verb"], e["condition"]) for e in metrics["episodes"]] == [
        ("touch", "plain"), ("home", "plain"), ("touch", "shuffled"), ("home", "shuffled"),
        ("touch", "black"),
    ]  # fmt: skip
    sheet = cv2.imread(str(tmp_path / "contact_sheet.png"))
    assert sheet is not None and sheet.shape == (
        2 * (TILE[1] + STRIP),
        LABEL_WIDTH + 6 * TILE[0],
        3,
    )
    success = sheet[STRIP : TILE[1], LABEL_WIDTH : LABEL_WIDTH + 3 * TILE[0]]
    missed = sheet[STRIP : TILE[1], LABEL_WIDTH + 3 * TILE[0] :]
    assert success.std() > 20 and missed.std() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--head", "fast"], "predicts no action tokens"),
        (["--checkpoint", "expert", "--output", "/proc/none"], "/proc/none"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", str(tmp_path), *arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--episodes", "0"],
        ["--delay-ms", "-1"],
        ["--limit-s", "no"],
        ["--limit-s", "nan"],
        ["--tasks", "touch", "dance"],
        ["--size", "15", "16"],
        ["--episodes", "1", "--per-task", "1"],
    ],
)
def test_invalid_options_are_refused(arguments: list[str]) -> None:
    assert run(*arguments) == 2
