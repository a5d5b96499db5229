"""`pi05 dagger`; fault: data that training cannot read beside the demonstrations."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pi05_lab.data import simulated
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.simulated import RecordConfig, SimulatedRecorder
from pi05_ros.adapters.factory import open_policy
from pi05_ros.cli import main


def run(*arguments: str) -> int:
    return main(["dagger", *arguments])


@pytest.mark.slow
def test_states_become_a_dataset_of_independent_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: noise that depends on which episodes a worker gets."""
    monkeypatch.setattr(simulated, "_ROLLOUT_SAMPLES", 2)
    code = run(
        "small", "--output", str(tmp_path / "data"), "--episodes", "2", "--workers", "1",
        "--tasks", "touch", "--instructions", "2", "--size", "32", "24", "--seed", "7",
    )  # fmt: skip
    assert code == 0
    dataset = LeRobotDataset(tmp_path / "data")
    assert len(dataset) == 2 * 2 * 2
    assert {"expert.action_chunk", "picture_index", "scene.cube_pixels"} <= set(dataset.extras)
    config = RecordConfig(("touch",), seed=7, size_px=(32, 24), states=True, instructions=2)
    policy = partial(open_policy, "small", seed=7, threads=1)
    alone = SimulatedRecorder(config, pickle.loads(pickle.dumps(policy)))
    second = alone(1)
    alone.close()
    for numbers, name in ((dataset.state, "state"), (dataset.action, "action")):
        expected = np.array([getattr(frame, name) for frame in second], np.float32)
        np.testing.assert_array_equal(numbers[4:], expected)
    assert not np.array_equal(dataset.state[:4], dataset.state[4:])


def test_a_wrong_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none"), "--output", str(tmp_path / "data")) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
