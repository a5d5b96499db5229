"""The examples run and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pi05_ros.cli import main
from pi05_ros.policy.robots import read_robot
from pi05_ros.robot_config import read_robot_config

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBERED = sorted(path for path in EXAMPLES.iterdir() if path.name[0].isdigit())


def run(*command: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": f"{EXAMPLES.parent}:{EXAMPLES}", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_numbered_examples_are_short() -> None:
    assert {path.name[:2] for path in NUMBERED} == {"01", "02", "03", "04", "05"}
    for path in NUMBERED:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("01_infer.py", "t + 0.80 s:"),
        ("04_other_policy.py", "moves every joint to zero → (50, 14)"),
        ("05_scheduler.py", "[[1.1, 9.0], [1.1, 9.0]]"),
    ],
)
def test_a_program_runs(name: str, expected: str) -> None:
    assert expected in run(sys.executable, str(EXAMPLES / name))


@pytest.mark.slow
def test_a_bag_is_evaluated(tmp_path: Path) -> None:
    record = ["--episodes", "1", "--tasks", "home", "--format", "mcap", "--output"]
    assert main(["record", *record, str(tmp_path / "bags")]) == 0
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bag = next((tmp_path / "bags").iterdir())
    run("sh", str(EXAMPLES / "03_evaluate_bag.sh"), str(bag), str(tmp_path / "out"), PATH=path)
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_robot_in_yaml_is_read_and_fits_its_params_file() -> None:
    config = read_robot_config(EXAMPLES / "02_own_robot.yaml")
    robot = read_robot(EXAMPLES / "02_own_robot_description.yaml")
    assert (EXAMPLES.parent / config.parameters.robot).samefile(
        EXAMPLES / "02_own_robot_description.yaml"
    )
    assert robot.state == robot.action == config.joints.names
    assert set(robot.cameras) == set(config.cameras)
