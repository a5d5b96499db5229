"""Pins: an evaluation with other parameters than the node's, faults of a file that pass unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi05_ros.policy.robots import read_robot
from pi05_ros.robot_config import RobotConfigError, read_robot_config

CONFIG = Path(__file__).parents[2] / "config"
ALOHA = CONFIG / "aloha.yaml"
METHOD = "method: temporal_ensemble"


def write(folder: Path, before: str, after: str) -> Path:
    """aloha.yaml with one text replaced by another."""
    text = ALOHA.read_text(encoding="utf-8")
    assert before in text
    file = folder / "robot.yaml"
    file.write_text(text.replace(before, after, 1), encoding="utf-8")
    return file


def test_columns_and_the_simulators_camera_rate_are_read() -> None:
    robot = read_robot_config(ALOHA)
    assert robot.columns == {
        "left_arm_controller": [*range(7)],
        "right_arm_controller": [*range(7, 14)],
    }
    assert robot.camera_rate_hz == 30.0 and robot.dt_s == 0.02


def test_dotted_names_mean_what_nested_blocks_mean(tmp_path: Path) -> None:
    """ROS takes both; one that is not seen would leave the default in force."""
    file = write(tmp_path, "    control_rate_hz: 50.0", "    faults.first_command: refuse")
    assert read_robot_config(file).faults.first_command == "refuse"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("max_velocity: 2.0", "max_velocity: fast"),
            "'joints.left_waist.max_velocity' must be a number with a decimal point, got 'fast'",
        ),
        (
            ("max_velocity: 2.0", "max_velocity: 2"),
            "'joints.left_waist.max_velocity' must be a number with a decimal point, got 2",
        ),
        (("names:\n        - left_waist", "names:\n        - waist"), r"'joints\.waist\.\*'"),
        (("- right_gripper\n", "\n"), "right_arm_controller.joints': 'right_gripper' is not in"),
        (("joints: [left_waist, ", "joints: ["), "no controller commands .*left_waist"),
        ((METHOD, "method: best"), "'scheduler.method' is 'best'; it may be"),
        (("ensemble_m: 0.01", "ensemble_m: few"), "'scheduler.ensemble_m' must be a number"),
        (("ensemble_m: 0.01", "newest_only: 3"), "'scheduler.newest_only' must be a list of names"),
        (("ensemble_m: 0.01", "newest_only: [elbow]"), "no joint is called .*elbow"),
        (("ensemble_m: 0.01", "ensemble_max_chunks: 0"), "ensemble_max_chunks' must be from 1 to"),
        (("ensemble_m: 0.01", "ensemble_max_chunks: true"), "must be a whole number, got True"),
        (("ensemble_m: 0.01", "ensemble_m: .nan"), "'scheduler.ensemble_m' must be from -10 to 10"),
        (("control_rate_hz: 50.0", "control_rate_hz: 0.0"), "'control_rate_hz' must be from 1 to"),
        ((METHOD, "methd: latest"), "'scheduler.methd' is unknown; did you mean 'scheduler.method"),
        (("    scheduler:", "    schedular:"), "'schedular.method' is unknown; did you mean"),
        (("required: true", "requird: true"), "did you mean 'cameras.cam_high.required'"),
        (("control_rate_hz: 50.0", "max_instruction_chars: 0"), "'max_instruction_chars' must be"),
        (("control_rate_hz: 50.0", "faults: {max_failures: 0}"), "'faults.max_failures' must be"),
        (("joints:\n      names", "joints: [\n      names"), "not valid YAML"),
        (("    joints:\n      names", "    joint:\n      names"), "ros__parameters with joints"),
    ],
)
def test_a_fault_is_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RobotConfigError, match="robot.yaml.*" + message):
        read_robot_config(write(tmp_path, *change))


def test_parameters_that_every_node_has_are_no_fault(tmp_path: Path) -> None:
    file = write(tmp_path, "control_rate_hz: 50.0", "use_sim_time: true")
    assert read_robot_config(file).parameters.control_rate_hz == 50.0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RobotConfigError, match=r"nowhere\.yaml cannot be read"):
        read_robot_config(tmp_path / "nowhere.yaml")


def test_aliases_that_grow_beyond_memory_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [
        f"a{k}: &a{k} {{" + ", ".join(f"k{i}: *a{k - 1}" for i in range(10)) + "}"
        for k in range(1, 12)
    ]
    lines += ["n: {ros__parameters: {joints: {names: [a], a: *a11}}}"]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(RobotConfigError, match="more than 10000 parameters"):
        read_robot_config(file)


def urdf(names: tuple[str, ...], velocity: float) -> str:
    joints = "".join(
        f'<joint name="{name}" type="prismatic">'
        f'<limit lower="-4" upper="4" velocity="{velocity}" effort="1"/></joint>'
        for name in names
    )
    return f'<robot name="r">{joints}</robot>'


def test_limits_of_a_urdf_are_those_that_the_node_would_have(tmp_path: Path) -> None:
    """An evaluation with wider limits than the robot's would show motions that it never makes."""
    file = write(tmp_path, "control_rate_hz: 50.0", "limits: {source: urdf}")
    config = read_robot_config(file)
    with pytest.raises(RobotConfigError, match="give the robot's URDF with --urdf FILE"):
        config.check_limits()
    description = tmp_path / "robot.urdf"
    description.write_text(urdf(config.joints.names, 0.1))
    tight = read_robot_config(file, description)
    tight.check_limits()
    assert (tight.joints.max_velocity == 0.1).all()
    description.write_text(urdf(config.joints.names[1:], 0.1))
    with pytest.raises(RobotConfigError, match=r"robot\.urdf: the URDF has no joint 'left_waist'"):
        read_robot_config(file, description)
    with pytest.raises(RobotConfigError, match="leave --urdf out"):
        read_robot_config(ALOHA, description)


@pytest.mark.parametrize("name", ["aloha", "droid", "ur5e", "generic"])
def test_params_files_fit_their_robot(name: str) -> None:
    """Pins: joints, cameras or keys that the robot's description lacks."""
    config = read_robot_config(ALOHA.parent / f"{name}.yaml")
    robot = config.parameters.robot
    description = read_robot(ALOHA.parent / robot if robot.endswith(".yaml") else robot)
    assert len(config.joints) == len(description.state) == len(description.action)
    columns = [column for part in config.columns.values() for column in part]
    assert sorted(columns) == list(range(len(config.joints)))
    assert set(config.cameras) == set(description.cameras)
    grippers = [i for i, joint in enumerate(description.action) if joint in description.grippers]
    assert list(config.joints.gripper.nonzero()[0]) == grippers
