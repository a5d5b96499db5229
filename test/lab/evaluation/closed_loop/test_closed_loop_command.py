"""Pins: a report without its header, controls or episodes, and faults that end in a traceback."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import pytest

from pi05_lab.evaluation.closed_loop import command as closed_loop_command
from pi05_lab.evaluation.closed_loop.report import LABEL_WIDTH, STRIP, TILE
from pi05_lab.evaluation.closed_loop.trials import CUBES
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.scene import SIDES
from pi05_lab.sim.tasks import VERBS

ALOHA = str(Path(__file__).parents[4] / "config" / "aloha.yaml")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    closed_loop_command.add_arguments(parser)
    return parser.parse_args([*arguments, "--params-file", ALOHA])


def test_the_choices_are_the_simulators() -> None:
    assert closed_loop_command.VERBS == VERBS
    assert closed_loop_command.SIDES == SIDES
    assert closed_loop_command.COLORS == SimulatedAloha().cubes == CUBES


def test_a_run_writes_figures_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--checkpoint expert --tasks touch home --colors red --arms left --episodes 1 --seed 3"
    )
    options += " --delay-ms 160 --replan 8 --scheduler latest --controls --limit-s 4"
    assert closed_loop_command.run(parse(*options.split(), "--output", str(tmp_path))) == 0
    printed = capsys.readouterr().out
    for word in ("latest", "every 8 ticks", "touch", "100 (21–100)", "other text", "looks"):
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
        (["--checkpoint", "expert", "--output", "/proc/none"], "/proc/none"),
    ],
)
def test_a_fault_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert closed_loop_command.run(parse("--output", str(tmp_path), *arguments)) == 1
    printed = capsys.readouterr().out
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "arguments",
    [["--episodes", "0"], ["--delay-ms", "-1"], ["--limit-s", "no"], ["--tasks", "dance"]],
)
def test_impossible_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
