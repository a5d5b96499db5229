"""`pi05 dagger`; fault: data that training cannot read beside the demonstrations."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pi05_ros.evaluation import dagger_command
from pi05_ros.recording.reader import LeRobotDataset


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    dagger_command.add_arguments(parser)
    return dagger_command.run(parser.parse_args(arguments))


def test_the_policys_states_become_a_dataset(tmp_path: Path) -> None:
    output = tmp_path / "data"
    code = run(
        "small", "--output", str(output), "--episodes", "1", "--workers", "1", "--tasks", "touch",
        "--instructions", "2", "--size", "32", "24",
    )  # fmt: skip
    assert code == 0
    dataset = LeRobotDataset(output)
    assert len(dataset) == 28
    assert {"action_chunk", "picture_index", "scene.cube_pixels"} <= set(dataset.extras)


def test_a_wrong_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none"), "--output", str(tmp_path / "data")) == 1
    assert "none" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()
