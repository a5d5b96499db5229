"""Robot conventions; faults: a sign, gripper map or reference that moves the wrong way."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_ros.policy.bundle import Settings, make_robot, match_cameras
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.robots import (
    GRIPPER_MAPS,
    NAMED,
    DescriptionError,
    Robot,
    gripper_from_angle,
    gripper_to_angle,
    gripper_to_finger,
    read_robot,
)
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "processing"
GOLDEN = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))["aloha"]
OPENPI = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
ALOHA_ROBOT = NAMED["aloha"]
CONFIG = PolicyConfig(state_dim=14, action_dim=14)
ALOHA = ("cam_high", "cam_left_wrist", "cam_right_wrist")

vectors = arrays(np.float64, 14, elements=st.floats(-3, 3))
chunks = arrays(np.float64, (5, 14), elements=st.floats(-3, 3))


def test_aloha_as_openpi() -> None:
    """Fault: a joint sign or gripper map other than the base checkpoints'."""
    robot = ALOHA_ROBOT
    for transform, given_, expected in (
        (robot.decode_state, "state", "decoded_state"),
        (robot.encode_action, "model_actions", "encoded_actions"),
        (robot.decode_action, "dataset_actions", "encoded_actions_inv"),
    ):
        got = transform(np.array(GOLDEN[given_]))
        np.testing.assert_allclose(got, GOLDEN[expected], rtol=1e-12, atol=1e-12)


def test_gripper_maps_as_openpi() -> None:
    """Fault: the measured and the commanded gripper treated alike."""
    for function, name in (
        (gripper_to_angle, "gripper_to_angular"),
        (gripper_from_angle, "gripper_from_angular"),
    ):
        for value, expected in GOLDEN[name].items():
            assert function(np.array(float(value))) == pytest.approx(expected, abs=1e-12)


@given(chunks)
def test_aloha_actions_come_back(actions: np.ndarray) -> None:
    """Fault: training data encoded otherwise than inference decodes; inputs changed in place."""
    robot = ALOHA_ROBOT
    before = actions.copy()
    back = robot.encode_action(robot.decode_action(actions))
    np.testing.assert_allclose(back, actions, atol=1e-12)
    np.testing.assert_array_equal(actions, before)


@given(chunks, vectors)
def test_relative_joints_absolute_grippers(actions: np.ndarray, state: np.ndarray) -> None:
    """Fault: steps summed up one after the other, or grippers taken as relative."""
    robot = ALOHA_ROBOT
    absolute = robot.to_absolute(actions, state)
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_allclose(absolute[:, joints], actions[:, joints] + state[joints])
    np.testing.assert_array_equal(absolute[:, [6, 13]], actions[:, [6, 13]])
    np.testing.assert_allclose(robot.to_delta(absolute, state), actions, atol=1e-12)


@given(chunks, vectors)
def test_without_conventions_nothing_changes(actions: np.ndarray, state: np.ndarray) -> None:
    """Fault: a checkpoint of plain absolute joints that gets flips or deltas."""
    for robot in (
        ALOHA_ROBOT.with_conventions(adapt_units=False, delta_actions=False),
        make_robot("generic", CONFIG, "lerobot", Settings(dt_s=0.1)),
    ):
        np.testing.assert_array_equal(robot.decode_state(state), state)
        np.testing.assert_array_equal(robot.to_absolute(actions, state), actions)
        np.testing.assert_array_equal(robot.encode_action(actions), actions)


def test_conventions_follow_the_checkpoints_origin() -> None:
    """Fault: a LeRobot fine-tune on ALOHA's own joints driven with openpi's flipped signs."""
    openpi = make_robot("aloha", CONFIG, "openpi", Settings())
    assert openpi.decode_state(np.ones(14))[1] == -1
    assert openpi.delta_mask == ALOHA_ROBOT.delta_mask
    lerobot = make_robot("aloha", CONFIG, "lerobot", Settings())
    assert lerobot.decode_state(np.ones(14))[1] == 1
    assert lerobot.delta_mask == ()


def test_settings_override_the_checkpoints_origin() -> None:
    """Fault: pi05_ros.json read and not applied."""
    settings = Settings(adapt_to_pi=True, delta_actions=True, dt_s=0.04)
    robot = make_robot("aloha", CONFIG, "lerobot", settings)
    assert robot.decode_state(np.ones(14))[1] == -1
    assert robot.delta_mask == ALOHA_ROBOT.delta_mask
    assert robot.dt_s == 0.04
    settings = Settings(adapt_to_pi=False, delta_actions=False)
    robot = make_robot("aloha", CONFIG, "openpi", settings)
    assert robot.decode_state(np.ones(14))[1] == 1
    assert robot.delta_mask == () and robot.dt_s == 0.02


def test_generic_takes_the_checkpoints_dimensions() -> None:
    """Fault: a robot of other dimensions made to look like ALOHA."""
    config = PolicyConfig(state_dim=6, action_dim=7, cameras=("front",))
    robot = make_robot("generic", config, "lerobot", Settings(dt_s=0.1))
    assert (robot.state_dim, robot.action_dim, robot.dt_s) == (6, 7, 0.1)
    assert robot.cameras == {"front": "front"}


@pytest.mark.parametrize(
    ("name", "config", "settings", "message"),
    [
        (
            "r2d2",
            CONFIG,
            Settings(),
            "unknown robot 'r2d2'; known: aloha, droid, libero, ur5e, generic",
        ),
        ("aloha", CONFIG, Settings(robot="generic"), "is for robot 'generic'"),
        ("aloha", replace(CONFIG, state_dim=7), Settings(), "state_dim 14, the checkpoint 7"),
        ("aloha", replace(CONFIG, action_dim=7), Settings(), "action_dim 14, the checkpoint 7"),
        ("aloha", PolicyConfig(max_action_dim=8), Settings(), "action_dim 14.*at most 8"),
        ("generic", CONFIG, Settings(), "dt_s"),
        ("generic", PolicyConfig(), Settings(dt_s=0.1), "state_dim"),
        ("generic", CONFIG, Settings(dt_s=0.1, adapt_to_pi=True), "adapt_to_pi is not for"),
    ],
)
def test_robots_that_do_not_fit_the_checkpoint_are_refused(
    name: str, config: PolicyConfig, settings: Settings, message: str
) -> None:
    """Fault: found out by moving."""
    with pytest.raises(ValueError, match=message):
        make_robot(name, config, "lerobot", settings)


def test_invalid_robots_are_refused() -> None:
    """Fault: a chunk without duration, a mask longer than the action."""
    with pytest.raises(ValueError, match="dt_s"):
        ALOHA_ROBOT.with_conventions(dt_s=0.0)
    with pytest.raises(ValueError, match="delta_mask has 3 values for 2"):
        Robot("r", ("a", "b"), ("a", "b"), 0.1, delta_mask=(True,) * 3)


def test_cameras_are_matched_by_name_then_by_convention() -> None:
    """Fault: wrist images in place of the overview."""
    usual = ALOHA_ROBOT.cameras
    assert match_cameras(usual, OPENPI, {}) == dict(zip(ALOHA, OPENPI, strict=True))
    assert match_cameras(usual, ALOHA, {}) == {name: name for name in ALOHA}
    assert match_cameras(usual, ("left", "cam_high"), {"cam_left_wrist": "left"}) == {
        "cam_high": "cam_high",
        "cam_left_wrist": "left",
    }
    assert match_cameras(usual, ("top",), {"roof": "top"}) == {"roof": "top"}
    assert match_cameras(usual, ("cam_high",), {}) == {"cam_high": "cam_high"}


@pytest.mark.parametrize(
    ("model", "rename", "message"),
    [
        (("top", "wrist"), {}, "no match for camera cam_high, .* top, wrist"),
        (("cam_high", "cam_wrist"), {}, "no match for camera cam_left_wrist"),
        (("cam_high",), {"cam_high": "roof"}, "no camera 'roof'; it has cam_high"),
        (("cam_high",), {"a": "cam_high", "b": "cam_high"}, "two cameras are renamed"),
    ],
)
def test_unmatched_camera_names_are_refused(
    model: tuple[str, ...], rename: dict[str, str], message: str
) -> None:
    """Fault: a misspelt camera is masked forever."""
    with pytest.raises(ValueError, match=message):
        match_cameras(ALOHA_ROBOT.cameras, model, rename)


def test_settings_file(tmp_path: Path) -> None:
    """Fault: a folder without the file refused, a field lost."""
    assert Settings.read(tmp_path) == Settings()
    document = {"robot": "aloha", "dt_s": 0.02, "cameras": {"a": "b"}, "trained": False}
    (tmp_path / "pi05_ros.json").write_text(json.dumps(document))
    assert Settings.read(tmp_path) == Settings(
        robot="aloha", dt_s=0.02, cameras={"a": "b"}, trained=False
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapt_to_pie", True),
        ("adapt_to_pi", "false"),
        ("delta_actions", 1),
        ("dt_s", -0.02),
        ("dt_s", True),
        ("dt_s", "50 Hz"),
        ("cameras", ["a"]),
        ("cameras", {"a": 1}),
        ("robot", 3),
        ("note", None),
    ],
)
def test_bad_settings_are_named(key: str, value: Any, tmp_path: Path) -> None:
    """Fault: a misspelt key leaves the signs flipped, the string "false" counts as true."""
    (tmp_path / "pi05_ros.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=key):
        Settings.read(tmp_path)


ROBOT_CONFIGS = Path(__file__).parents[3] / "config"
MINIMAL: dict[str, Any] = {"name": "r", "state": ["a", "b"], "action": ["a", "b"], "dt_s": 0.1}


def unit(robot: Robot, seed: int, steps: int = 6) -> np.ndarray:
    """Actions in (0, 1), where every gripper map is defined."""
    return np.random.default_rng(seed).uniform(0.05, 0.95, (steps, robot.action_dim))


@pytest.mark.parametrize("name", NAMED)
def test_a_description_is_the_same_after_yaml(name: str, tmp_path: Path) -> None:
    """Fault: a key that the file cannot express, so that a robot of one's own lacks it."""
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(asdict(NAMED[name])), encoding="utf-8")
    assert read_robot(path) == NAMED[name]
    assert read_robot(str(path)) == NAMED[name]
    assert read_robot(asdict(NAMED[name])) == NAMED[name]


@pytest.mark.parametrize("name", [name for name in NAMED if name != "droid"])
@pytest.mark.parametrize("gripper_map", GRIPPER_MAPS)
@given(seed=st.integers(0, 2**32 - 1))
def test_actions_come_back(name: str, gripper_map: str, seed: int) -> None:
    """Fault: training encodes otherwise than inference decodes, in any gripper convention."""
    robot = replace(NAMED[name], gripper_map=gripper_map)
    actions = unit(robot, seed)
    state = np.linspace(0.1, 0.9, robot.state_dim)
    decoded = robot.decode_state(state)
    delta = robot.to_delta(robot.decode_action(actions), decoded)
    back = robot.encode_action(robot.to_absolute(delta, decoded))
    np.testing.assert_allclose(back, actions, atol=1e-9)


@given(arrays(np.float64, (5, 8), elements=st.floats(-1, 1)))
def test_droids_velocities_add_up_from_the_state(velocities: np.ndarray) -> None:
    """Fault: a velocity sent as a position, steps that do not add up, a half-shut gripper."""
    robot = NAMED["droid"]
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


def test_velocities_are_clipped() -> None:
    """Fault: an outlier that moves a joint by more than the controller of the data ever did."""
    robot = NAMED["droid"]
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
        robot = NAMED[name]
        assert (robot.state_dim, robot.action_dim, robot.dt_s) == (state_dim, action_dim, dt_s)
        assert [i for i, flag in enumerate(robot.delta_mask) if flag] == relative
    assert NAMED["libero"].rotated_cameras == ("image", "wrist_image")


@given(st.floats(0, 1))
def test_the_finger_convention_undoes_the_measurement(opening: float) -> None:
    """Fault: a gripper commanded to another opening than the measured one."""
    there = gripper_to_angle(np.array(opening))
    assert gripper_to_finger(there) == pytest.approx(opening, abs=1e-9)


def test_signs_and_gripper_range_of_a_description() -> None:
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


def test_only_named_robots_follow_the_checkpoints_origin() -> None:
    """Fault: LeRobot data in ALOHA's own numbers driven with openpi's signs, or the reverse."""
    named = make_robot("ur5e", PolicyConfig(), "lerobot", Settings())
    assert named.delta_mask == ()
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
    assert plain.delta_mask == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name must not be None"),
        ({"joints": []}, "unknown key 'joints'"),
        ({"gripper_rang": [0, 1]}, "unknown key 'gripper_rang': did you mean 'gripper_range'?"),
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
        ({"gripper_range": [1]}, "gripper_range needs two different"),
        ({"gripper_range": ["0", 1]}, "gripper_range must not be"),
        ({"gripper_map": "servo"}, "gripper_map 'servo' is unknown; known: linear"),
        ({"cameras": ["a"]}, "cameras must not be"),
        ({"rotated_cameras": ["top"]}, "rotated camera 'top' is no camera"),
        ({"velocity_step": 0.2, "delta_mask": [True, False]}, "excludes delta_mask"),
    ],
)
def test_bad_descriptions_are_named(change: dict[str, Any], message: str) -> None:
    """Fault: a misspelt key, or a value that only motion would show to be wrong."""
    with pytest.raises(DescriptionError, match=message):
        read_robot(MINIMAL | change)


def test_a_missing_key_is_named() -> None:
    """Fault: a robot without a rate."""
    with pytest.raises(DescriptionError, match="dt_s is missing"):
        read_robot({key: value for key, value in MINIMAL.items() if key != "dt_s"})


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
        read_robot(tmp_path / "robot.yaml")


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
def test_hostile_files_are_refused_with_short_messages(content: str, tmp_path: Path) -> None:
    """Pins: aliases that make a few lines an error of gigabytes, and what YAML's constructors
    raise beside YAML's own errors."""
    file = tmp_path / "robot.yaml"
    file.write_text(content)
    with pytest.raises(DescriptionError) as caught:
        read_robot(file)
    assert len(str(caught.value)) < 600


def test_shipped_descriptions() -> None:
    """Fault: the example does not load, or libero.yaml has drifted away."""
    assert read_robot(ROBOT_CONFIGS / "libero.yaml") == NAMED["libero"]
    own = read_robot(ROBOT_CONFIGS / "robot_description.yaml")
    assert own.name == "five_joints"
    document = yaml.safe_load(
        (ROBOT_CONFIGS / "robot_description.yaml").read_text(encoding="utf-8")
    )
    assert set(document) == set(asdict(NAMED["aloha"])), "the example shows every key"
