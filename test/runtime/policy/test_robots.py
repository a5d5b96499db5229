"""Robot conventions; faults: a sign, gripper map or reference that moves the wrong way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.robots import (
    ALOHA_DELTA_MASK,
    Robot,
    Settings,
    aloha,
    generic,
    gripper_from_angle,
    gripper_to_angle,
    make_robot,
    match_cameras,
)
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "processing"
GOLDEN = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))["aloha"]
OPENPI = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
ALOHA = ("cam_high", "cam_left_wrist", "cam_right_wrist")

vectors = arrays(np.float64, 14, elements=st.floats(-3, 3))
chunks = arrays(np.float64, (5, 14), elements=st.floats(-3, 3))


def test_aloha_as_openpi() -> None:
    """Fault: a joint sign or gripper map other than the base checkpoints'."""
    robot = aloha()
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
    robot = aloha()
    before = actions.copy()
    back = robot.encode_action(robot.decode_action(actions))
    np.testing.assert_allclose(back, actions, atol=1e-12)
    np.testing.assert_array_equal(actions, before)


@given(chunks, vectors)
def test_relative_joints_absolute_grippers(actions: np.ndarray, state: np.ndarray) -> None:
    """Fault: steps summed up one after the other, or grippers taken as relative."""
    robot = aloha()
    absolute = robot.to_absolute(actions, state)
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_allclose(absolute[:, joints], actions[:, joints] + state[joints])
    np.testing.assert_array_equal(absolute[:, [6, 13]], actions[:, [6, 13]])
    np.testing.assert_allclose(robot.to_delta(absolute, state), actions, atol=1e-12)


@given(chunks, vectors)
def test_without_conventions_nothing_changes(actions: np.ndarray, state: np.ndarray) -> None:
    """Fault: a checkpoint of plain absolute joints that gets flips or deltas."""
    for robot in (
        aloha(adapt_to_pi=False, delta_actions=False),
        generic(14, 14, ["top"], dt_s=0.1),
    ):
        np.testing.assert_array_equal(robot.decode_state(state), state)
        np.testing.assert_array_equal(robot.to_absolute(actions, state), actions)
        np.testing.assert_array_equal(robot.encode_action(actions), actions)


CONFIG = PolicyConfig(state_dim=14, action_dim=14)


def test_conventions_follow_the_checkpoints_origin() -> None:
    """Fault: a LeRobot fine-tune on ALOHA's own joints driven with openpi's flipped signs."""
    openpi = make_robot("aloha", CONFIG, "openpi", Settings())
    assert openpi.decode_state(np.ones(14))[1] == -1
    assert openpi.delta_mask == ALOHA_DELTA_MASK
    lerobot = make_robot("aloha", CONFIG, "lerobot", Settings())
    assert lerobot.decode_state(np.ones(14))[1] == 1
    assert lerobot.delta_mask is None


def test_settings_decide() -> None:
    """Fault: pi05_ros.json read and not heeded."""
    settings = Settings(adapt_to_pi=True, delta_actions=True, dt_s=0.04)
    robot = make_robot("aloha", CONFIG, "lerobot", settings)
    assert robot.decode_state(np.ones(14))[1] == -1
    assert robot.delta_mask == ALOHA_DELTA_MASK
    assert robot.dt_s == 0.04
    settings = Settings(adapt_to_pi=False, delta_actions=False)
    robot = make_robot("aloha", CONFIG, "openpi", settings)
    assert robot.decode_state(np.ones(14))[1] == 1
    assert robot.delta_mask is None and robot.dt_s == 0.02


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
def test_what_does_not_fit_is_named(
    name: str, config: PolicyConfig, settings: Settings, message: str
) -> None:
    """Fault: found out by moving."""
    with pytest.raises(ValueError, match=message):
        make_robot(name, config, "lerobot", settings)


def test_impossible_robots_are_refused() -> None:
    """Fault: a chunk without duration, a mask longer than the action."""
    with pytest.raises(ValueError, match="dt_s"):
        aloha(dt_s=0.0)
    with pytest.raises(ValueError, match="delta_mask has 3 values for 2"):
        Robot("r", 2, 2, 0.1, {}, delta_mask=(True,) * 3)


def test_cameras_are_matched_by_name_then_by_convention() -> None:
    """Fault: wrist pictures in the place of the overview."""
    usual = aloha().cameras
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
        (("cam_high",), {"a": "cam_high"}, "two cameras are mapped"),
    ],
)
def test_camera_names_that_do_not_match_are_named(
    model: tuple[str, ...], rename: dict[str, str], message: str
) -> None:
    """Fault: a misspelt camera is masked for ever."""
    with pytest.raises(ValueError, match=message):
        match_cameras(aloha().cameras, model, rename)


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
