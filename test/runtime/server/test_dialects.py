"""Clients' words become observations; faults: channels in another order, a value of another shape
that reaches the policy, an error in words that a client does not understand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_ros.protocol import ProtocolError, unpack
from pi05_ros.server.dialects import Dialect, Expected, answer, failure, read_request
from pi05_ros.types import ActionChunk

ALOHA = Expected(("cam_high", "cam_left_wrist"), 14, 50, 14, "wave")
DROID = Expected(("exterior_image_1_left", "wrist_image_left"), 8, 15, 8)
LIBERO = Expected(("image", "wrist_image"), 8, 10, 7)
FRAMES = Path(__file__).parents[2] / "data" / "serving"
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def aloha(**changes: Any) -> dict[Any, Any]:
    images = {"cam_high": IMAGE.transpose(2, 0, 1), "cam_low": IMAGE}
    message = {"images": images, "state": np.linspace(0, 1, 14), "prompt": "lift"}
    return message | changes


def test_alohas_images_are_channels_first() -> None:
    request = read_request(aloha(), ALOHA, 5.0)
    assert request.observation is not None
    np.testing.assert_array_equal(request.observation.images["cam_high"], IMAGE)
    assert set(request.observation.images) == {"cam_high"}, "cameras of others are left out"
    np.testing.assert_allclose(request.observation.state, np.linspace(0, 1, 14))
    assert (request.observation.instruction, request.observation.stamp_s) == ("lift", 5.0)


def test_droids_and_liberos_keys() -> None:
    droid = {
        "observation/exterior_image_1_left": IMAGE,
        "observation/wrist_image_left": IMAGE,
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([0.5], np.float32),
        "prompt": "open the drawer",
    }
    request = read_request(droid, DROID, 0.0)
    assert request.observation is not None
    assert request.observation.state.tolist() == [0, 1, 2, 3, 4, 5, 6, 0.5]
    assert set(request.observation.images) == set(DROID.cameras)
    droid["observation/gripper_position"] = 0.5
    again = read_request(droid, DROID, 0.0).observation
    assert again is not None and again.state[-1] == 0.5
    libero = {
        b"observation/image": IMAGE, b"observation/wrist_image": IMAGE,
        b"observation/state": np.zeros(8), b"prompt": b"stack",
    }  # fmt: skip
    found = read_request(libero, LIBERO, 0.0).observation
    assert found is not None and set(found.images) == {"image", "wrist_image"}
    assert found.instruction == "stack"


def test_what_is_optional() -> None:
    message = aloha(session_id="arm 3", observation_stamp=12.5)
    del message["prompt"]
    request = read_request(message, ALOHA, 5.0)
    assert request.observation is not None
    assert (request.observation.instruction, request.observation.stamp_s) == ("wave", 12.5)
    assert request.session == "arm 3" and request.prefix is None
    assert read_request({"endpoint": "reset"}, ALOHA, 0.0).observation is None
    floats = read_request(aloha(images={"cam_high": IMAGE / 255.0}), ALOHA, 0.0).observation
    assert floats is not None and np.abs(floats.images["cam_high"].astype(int) - IMAGE).max() <= 1
    prefix = read_request(
        aloha(prev_actions=np.ones((20, 14)), inference_delay=3), ALOHA, 0.0
    ).prefix
    assert prefix is not None and prefix.committed_steps == 3 and prefix.actions.shape == (20, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, r"no image of this policy's cameras \['cam_high', 'cam_left_wrist'\]"),
        ({"images": {"cam_high": IMAGE[0]}}, r"image 'cam_high' must be \[H, W, 3\]"),
        ({"images": {"cam_high": "a path"}}, "not str"),
        ({"images": {"cam_high": IMAGE.astype(np.int32)}}, "must be uint8, not int32"),
        ({"images": {"cam_high": IMAGE * 2.0}}, "floats must be from 0 to 1"),
        ({"images": {"cam_high": IMAGE * np.nan}}, "floats must be from 0 to 1"),
        ({"images": {"cam_high": np.zeros((0, 5, 3), np.uint8)}}, "5 × 0 pixels"),
        ({"images": [IMAGE]}, "must be a map, got list"),
        ({"state": np.zeros(7)}, r"state must have shape \[14\], not \[7\]"),
        ({"state": np.full(14, np.inf)}, "state has a value that is not finite"),
        ({"state": ["a"] * 14}, r"state must be numbers \[14\]"),
        ({"state": None}, "state must"),
        ({"prompt": 5}, "prompt must be text"),
        ({"prompt": "x" * 5000}, "at most 2000 characters"),
        ({"endpoint": "delete"}, "infer or reset, not 'delete'"),
        ({"observation_stamp": "now"}, "observation_stamp must be numbers"),
        ({"prev_actions": np.zeros((51, 14))}, "1 to 50 steps"),
        ({"prev_actions": np.zeros((5, 13))}, r"prev_actions must have shape \[5, 14\]"),
        ({"prev_actions": np.zeros((5, 14)), "inference_delay": 6}, "from 0 to 5, not 6"),
    ],
)
def test_bad_requests_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        read_request(aloha(**changes), ALOHA, 0.0)


def test_a_request_without_state_is_named() -> None:
    message = aloha()
    del message["state"]
    with pytest.raises(ProtocolError, match="no state: none of state, observation/state"):
        read_request(message, ALOHA, 0.0)


def test_paths_tell_the_dialects_apart() -> None:
    assert Dialect.of("/") is Dialect.OPENPI and Dialect.of("") is Dialect.OPENPI
    assert Dialect.of("/openpi/policy?x=1") is Dialect.SGLANG
    assert Dialect.of("/v1/realtime/robot/openpi/") is Dialect.VLLM
    assert Dialect.of("/admin") is None


def test_answers_and_errors_in_each_dialect() -> None:
    chunk = ActionChunk(np.ones((50, 14)), 0.0, 0.02, timings_s={"vision": 0.01, "prefix": 0.02})
    found = answer(chunk, Dialect.OPENPI, {"infer_ms": 0.05})
    assert found["actions"].dtype == np.float32 and found["actions"].shape == (50, 14)
    assert found["policy_timing"]["infer_ms"] == pytest.approx(30)
    assert found["server_timing"] == {"infer_ms": pytest.approx(50)}
    assert isinstance(answer(chunk, Dialect.VLLM, {}), np.ndarray)
    assert failure("no", Dialect.OPENPI) == "no"
    assert failure("no", Dialect.SGLANG) == {"error": "no"}
    assert failure("no", Dialect.VLLM) == {"type": "error", "message": "no"}


@pytest.mark.parametrize(
    ("file", "expected", "prompt"),
    [
        ("openpi_aloha", ALOHA, "take the toast out"),
        ("openpi_droid", DROID, "open the drawer"),
        ("openpi_libero", LIBERO, "stack the bowls"),
        ("msgpack_numpy_aloha", ALOHA, "take the toast out"),
    ],
)
def test_frames_that_other_clients_packed(file: str, expected: Expected, prompt: str) -> None:
    """test/data/serving/README.md says by which code."""
    request = read_request(unpack((FRAMES / f"{file}.msgpack").read_bytes()), expected, 0.0)
    assert request.observation is not None
    assert request.observation.instruction == prompt
    assert set(request.observation.images) == set(expected.cameras)
    for image in request.observation.images.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.shape[0] == 8
    state = request.observation.state
    if expected is DROID:
        assert state[-1] == 0.25
        state = state[:-1]
    np.testing.assert_allclose(state, np.linspace(-1, 1, len(state)), atol=1e-6)
    assert request.session == ("robot-1" if file.startswith("msgpack_numpy") else "")


def test_a_reset_that_another_client_packed() -> None:
    request = read_request(
        unpack((FRAMES / "msgpack_numpy_reset.msgpack").read_bytes()), ALOHA, 0.0
    )
    assert request.observation is None and request.session == "robot-1"
