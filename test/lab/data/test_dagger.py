"""`pi05 dagger`; fault: data that training cannot read beside the demonstrations."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from pi05_lab.data import dagger as dagger_command
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.sim.rendering import CAMERAS
from pi05_ros.types import FloatArray


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


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    """Fault: the noise went on over the episodes that a worker happened to get."""
    data = []
    for workers in ("1", "2"):
        output = tmp_path / workers
        code = run(
            "small", "--output", str(output), "--episodes", "3", "--workers", workers,
            "--tasks", "touch", "--instructions", "1", "--size", "32", "24",
        )  # fmt: skip
        assert code == 0
        data.append(LeRobotDataset(output))
    np.testing.assert_array_equal(data[0].state, data[1].state)
    np.testing.assert_array_equal(data[0].action, data[1].action)


def test_an_episodes_noise_follows_from_its_number(tmp_path: Path) -> None:
    actor = dagger_command.PolicyActor("small", 7)
    images = {name: np.zeros((24, 32, 3), np.uint8) for name in CAMERAS}
    state = np.zeros(14)

    def act(episode: int) -> FloatArray:
        actor.begin(episode)
        return actor(images, state, "touch the red cube")

    first = act(0)
    assert not np.array_equal(first, act(1))
    np.testing.assert_array_equal(first, act(0))


def test_a_wrong_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none"), "--output", str(tmp_path / "data")) == 1
    assert "none" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()
