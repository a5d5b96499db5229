"""Robots in words; faults: a convention lost between YAML and motion, a typo that is ignored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.robots import (
    GRIPPER_MAPS,
    NAMED,
    DescriptionError,
    Robot,
    RobotDescription,
    Settings,
    build_robot,
    gripper_to_angle,
    gripper_to_finger,
    make_robot,
    parse_description,
    read_description,
)

CONFIG = Path(__file__).parents[3] / "config"
MINIMAL: dict[str, Any] = {"name": "r", "state": ["a", "b"], "action": ["a", "b"], "dt_s": 0.1}


def unit(robot: Robot, seed: int, steps: int = 6) -> np.ndarray:
    """Actions in (0, 1), where every gripper map is defined."""
    return np.random.default_rng(seed).uniform(0.05, 0.95, (steps, robot.action_dim))


@pytest.mark.parametrize("name", NAMED)
def test_a_description_survives_yaml(name: str, tmp_path: Path) -> None:
    """Fault: a key that the file cannot express, so that a robot of one's own lacks it."""
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(NAMED[name].to_mapping()), encoding="utf-8")
    assert read_description(path) == NAMED[name]
    assert read_description(str(path)) == NAMED[name]
    assert read_description(NAMED[name].to_mapping()) == NAMED[name]


@pytest.mark.parametrize("name", [name for name in NAMED if name != "droid"])
@pytest.mark.parametrize("gripper_map", GRIPPER_MAPS)
@given(seed=st.integers(0, 2**32 - 1))
def test_actions_come_back(name: str, gripper_map: str, seed: int) -> None:
    """Fault: training encodes otherwise than inference decodes, in any gripper convention."""
    robot = build_robot(replace(NAMED[name], gripper_map=gripper_map))
    actions = unit(robot, seed)
    state = np.linspace(0.1, 0.9, robot.state_dim)
    decoded = robot.decode_state(state)
    delta = robot.to_delta(robot.decode_action(actions), decoded)
    back = robot.encode_action(robot.to_absolute(delta, decoded))
    np.testing.assert_allclose(back, actions, atol=1e-9)


@given(arrays(np.float64, (5, 8), elements=st.floats(-1, 1)))
def test_droids_velocities_add_up_from_the_state(velocities: np.ndarray) -> None:
    """Fault: a velocity sent as a position, steps that do not add up, a half-shut gripper."""
    robot = build_robot(NAMED["droid"])
    state = np.array([0.1, -0.2, 0.3, -2.0, 0.5, 1.5, -0.7, 0.4])
    absolute = robot.to_absolute(velocities, state)
    position = state[:7].copy()
    for step in range(5):
        position = position + 0.2 * velocities[step, :7]
        np.testing.assert_allclose(absolute[step, :7], position, atol=1e-12)
    np.testing.assert_array_equal(absolute[:, 7], velocities[:, 7])
    np.testing.assert_allclose(robot.to_delta(absolute, state), velocities, atol=1e-9)
    sent = robot.encode_action(absolute)
    np.testing.assert_array_equal(sent[:, 7], velocities[:, 7] > 0.5)


def test_velocities_beyond_one_are_cut() -> None:
    """Fault: an outlier that moves a joint by more than the controller of the data ever did."""
    robot = build_robot(NAMED["droid"])
    wild = np.full((1, 8), -7.0)
    np.testing.assert_allclose(robot.to_absolute(wild, np.zeros(8))[0, :7], -0.2)


def test_published_conventions() -> None:
    """Fault: another mask, rate or width than the published checkpoints were trained with."""
    expected = {
        "aloha": (14, 14, 0.02, [i for i in range(14) if i not in (6, 13)]),
        "droid": (8, 8, 1 / 15, []),
        "libero": (8, 7, 0.05, []),
        "ur5e": (7, 7, 0.05, list(range(6))),
    }
    assert set(NAMED) == set(expected)
    for name, (state_dim, action_dim, dt_s, relative) in expected.items():
        robot = build_robot(NAMED[name])
        assert (robot.state_dim, robot.action_dim, robot.dt_s) == (state_dim, action_dim, dt_s)
        assert [i for i, flag in enumerate(robot.delta_mask or ()) if flag] == relative
    assert build_robot(NAMED["libero"]).rotated_cameras == {"image", "wrist_image"}


@given(st.floats(0, 1))
def test_the_finger_convention_undoes_the_measurement(opening: float) -> None:
    """Fault: a gripper that is told another opening than the one it was measured at."""
    there = gripper_to_angle(np.array(opening))
    assert gripper_to_finger(there) == pytest.approx(opening, abs=1e-9)


def test_signs_ranges_and_grippers_of_ones_own() -> None:
    """Fault: the sign on the gripper's closed side, the range the wrong way round."""
    document = MINIMAL | {
        "state": ["a", "g"],
        "action": ["a", "g"],
        "signs": [-1, 1],
        "grippers": ["g"],
        "gripper_range": [0.08, 0.0],
    }
    robot = make_robot(document, PolicyConfig(), "lerobot", Settings())
    np.testing.assert_allclose(robot.decode_state(np.array([0.5, 0.08])), [-0.5, 0.0])
    np.testing.assert_allclose(robot.decode_state(np.array([0.5, 0.02])), [-0.5, 0.75])
    np.testing.assert_allclose(robot.encode_action(np.array([[-0.5, 0.75]])), [[0.5, 0.02]])


def test_own_descriptions_hold_and_names_follow_the_checkpoints_origin() -> None:
    """Fault: LeRobot data in ALOHA's own numbers driven with openpi's signs, or the reverse."""
    named = make_robot("ur5e", PolicyConfig(), "lerobot", Settings())
    assert named.delta_mask is None
    own = make_robot({"base": "ur5e", "dt_s": 0.1}, PolicyConfig(), "lerobot", Settings())
    assert own.delta_mask == NAMED["ur5e"].delta_mask and own.dt_s == 0.1
    openpi = make_robot("ur5e", PolicyConfig(), "openpi", Settings())
    assert openpi.delta_mask == NAMED["ur5e"].delta_mask
    plain = make_robot(
        {"base": "aloha", "signs": [], "gripper_map": "linear", "delta_mask": []},
        PolicyConfig(),
        "openpi",
        Settings(),
    )
    values = np.linspace(-1, 1, 14)
    np.testing.assert_array_equal(plain.decode_state(values), values)
    assert plain.delta_mask is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name must not be None"),
        ({"joints": []}, "unknown key 'joints'"),
        ({"base": "r2d2"}, "base 'r2d2' is unknown; known: aloha"),
        ({"dt_s": 0}, "dt_s must be above 0"),
        ({"dt_s": "50 Hz"}, "dt_s must not be '50 Hz'"),
        ({"state": []}, "state and action must be lists"),
        ({"state": "a"}, "state must not be 'a'"),
        ({"state": ["a", "a"]}, "state has a name twice"),
        ({"signs": [1]}, r"signs must be 1 or -1 for each of \[2\]"),
        ({"signs": [1, 2]}, "signs must be 1 or -1"),
        ({"delta_mask": [True]}, "delta_mask has 1 values for 2 actions"),
        ({"delta_mask": [1, 0]}, "delta_mask must not be"),
        ({"state": ["a"], "delta_mask": [False, True]}, "action 1 relative to a state of 1"),
        ({"grippers": ["c"]}, "gripper 'c' is neither"),
        ({"gripper_range": [1, 1]}, "gripper_range needs two different"),
        ({"gripper_range": [1]}, "gripper_range must not be"),
        ({"gripper_map": "servo"}, "gripper_map 'servo' is unknown; known: linear"),
        ({"cameras": ["a"]}, "cameras must not be"),
        ({"rotated_cameras": ["top"]}, "rotated camera 'top' is no camera"),
        ({"velocity_step": 0.2, "delta_mask": [True, False]}, "excludes delta_mask"),
    ],
)
def test_bad_descriptions_are_named(change: dict[str, Any], message: str) -> None:
    """Fault: a misspelt key, or a value that only motion would show to be wrong."""
    with pytest.raises(DescriptionError, match=message):
        parse_description(MINIMAL | change)


def test_a_missing_key_is_named() -> None:
    """Fault: a robot without a rate."""
    with pytest.raises(DescriptionError, match="dt_s is missing"):
        parse_description({key: value for key, value in MINIMAL.items() if key != "dt_s"})


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("[1, 2]", "must hold keys"), ("a: [", "is not YAML"),
     ("name: 3", r"robot\.yaml: name must not be 3")],
)  # fmt: skip
def test_bad_files_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    """Fault: a traceback of the parser instead of the file's name."""
    if content is not None:
        (tmp_path / "robot.yaml").write_text(content)
    with pytest.raises(DescriptionError, match=message):
        read_description(tmp_path / "robot.yaml")


ALIASES = "".join(f"- &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12))


@pytest.mark.parametrize(
    "content",
    [
        f"signs:\n- &a [lol, lol]\n{ALIASES}",
        f"base:\n- &a [lol, lol]\n{ALIASES}",
        "signs: &a [*a]",
        "dt_s: " + "[" * 2000,
        "dt_s: " + "9" * 5000,
        "dt_s: " + "9" * 400,
        "dt_s: 2020-99-99",
        'dt_s: !!int ""',
        "dt_s: !!timestamp x",
        "? [a]\n: 1",
        "base: {aloha: 1}",
        "name: " + "x" * 5000,
        "# " + "x" * 2**20,
    ],
    ids=lambda content: content[:20],
)
def test_hostile_files_are_refused_in_few_words(content: str, tmp_path: Path) -> None:
    """Pins: aliases that make a few lines an error of gigabytes, and what YAML's constructors
    raise beside YAML's own errors."""
    file = tmp_path / "robot.yaml"
    file.write_text(content)
    with pytest.raises(DescriptionError) as caught:
        read_description(file)
    assert len(str(caught.value)) < 600


def test_shipped_descriptions() -> None:
    """Fault: the example that people copy does not load, or libero.yaml has drifted away."""
    assert read_description(CONFIG / "libero.yaml") == NAMED["libero"]
    own = read_description(CONFIG / "robot_description.yaml")
    assert isinstance(own, RobotDescription) and own.name == "five_joints"
    document = yaml.safe_load((CONFIG / "robot_description.yaml").read_text(encoding="utf-8"))
    assert set(document) == set(NAMED["aloha"].to_mapping()), "the example shows every key"
