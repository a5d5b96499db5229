"""What clients send, as observations: openpi's, SGLang's and vllm-omni's words for the same things.

openpi's keys are those of each robot's input transform: ALOHA has `images`, channels first, and
`state`; DROID and LIBERO have keys that begin with `observation/`. Sources: openpi
`policies/{aloha,droid,libero}_policy.py`, SGLang 0.5.23 and vllm-omni 0.30 (their documentation).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi05_ros.protocol import ProtocolError, text_keys
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation

PREFIX = "observation/"
MAX_PROMPT = 2000
MAX_SIDE = 8192
"""Pixels."""


ALIASES = {"/v1/actions/realtime": "/openpi/policy"}
"""SGLang's other path."""


class Dialect(enum.Enum):
    """Whose words a connection speaks, by its path."""

    OPENPI = "/"
    SGLANG = "/openpi/policy"
    VLLM = "/v1/realtime/robot/openpi"

    @classmethod
    def of(cls, path: str) -> Dialect | None:
        """The dialect of a request's path; None for an unknown one."""
        bare = path.partition("?")[0].rstrip("/") or "/"
        bare = ALIASES.get(bare, bare)
        return next((dialect for dialect in cls if dialect.value == bare), None)


@dataclass(frozen=True)
class Request:
    """One message of a client."""

    observation: Observation | None
    """None for a reset."""
    session: str = ""
    prefix: ActionPrefix | None = None
    noise_seed: int | None = None


@dataclass(frozen=True)
class Expected:
    """What the served policy takes."""

    cameras: Sequence[str]
    state_dim: int
    horizon: int
    action_dim: int
    prompt: str = ""
    """For requests without one."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Another name of a camera → the policy's."""


def read_request(message: Any, expected: Expected, stamp_s: float) -> Request:
    """A client's message.

    Args:
        message: unpacked.
        expected: by the policy.
        stamp_s: of the observation, if the message has no `observation_stamp`.

    Raises:
        ProtocolError: no map, unknown cameras, or values of another type, shape or range; the
            message names the key.
    """
    keys = text_keys(message)
    session = _text(keys, "session_id", "")
    if _text(keys, "endpoint", "infer") == "reset":
        return Request(None, session)
    if keys.get("endpoint", "infer") != "infer":
        raise ProtocolError(f"endpoint must be infer or reset, not {keys['endpoint']!r:.40}")
    images = _images(keys, expected)
    state = _state(keys, expected)
    prompt = _text(keys, "prompt", expected.prompt)
    stamp = keys.get("observation_stamp")
    if stamp is not None:
        stamp_s = float(_numbers("observation_stamp", stamp, ()))
    observation = Observation(images, state, prompt, stamp_s)
    return Request(observation, session, _prefix(keys, expected))


def answer(chunk: ActionChunk, dialect: Dialect, server_s: Mapping[str, float]) -> Any:
    """A chunk as the dialect's answer; times in milliseconds."""
    actions = chunk.actions.astype(np.float32)
    infer_s = sum(chunk.timings_s.values())
    result = {
        "actions": actions,
        "policy_timing": {"infer_ms": 1e3 * infer_s},
        "server_timing": {name: 1e3 * seconds for name, seconds in server_s.items()},
    }
    return actions if dialect is Dialect.VLLM else result


def failure(text: str, dialect: Dialect) -> str | dict[str, Any]:
    """An error as the dialect sends it: text, or a map for a binary frame."""
    if dialect is Dialect.OPENPI:
        return text
    return {"error": text} if dialect is Dialect.SGLANG else {"type": "error", "message": text}


def _images(keys: Mapping[str, Any], expected: Expected) -> dict[str, ImageArray]:
    found: dict[str, Any] = {}
    if "images" in keys:
        found = text_keys(keys["images"])
    for key, value in keys.items():
        if key.startswith(PREFIX) and isinstance(value, np.ndarray) and value.ndim == 3:
            found[key.removeprefix(PREFIX)] = value
    images = {}
    for name, value in found.items():
        ours = expected.aliases.get(name, name)
        if ours in expected.cameras:
            images[ours] = _image(name, value)
    if not images:
        raise ProtocolError(
            f"no image of this policy's cameras {list(expected.cameras)}; the message has "
            f"{sorted(found)}"
        )
    return images


def _image(name: str, value: Any) -> ImageArray:
    """[H, W, 3] uint8 from that, from channels first, or from floats in 0 to 1."""
    if (
        not isinstance(value, np.ndarray)
        or value.ndim != 3
        or 3 not in (value.shape[0], value.shape[2])
    ):
        shape = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        raise ProtocolError(f"image {name!r} must be [H, W, 3] or [3, H, W], not {shape}")
    if value.shape[2] != 3:
        value = value.transpose(1, 2, 0)
    height, width = value.shape[:2]
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ProtocolError(f"image {name!r} is {width} × {height} pixels")
    if value.dtype.kind == "f":
        if not (np.isfinite(value).all() and value.min() >= 0 and value.max() <= 1):
            raise ProtocolError(f"image {name!r}: floats must be from 0 to 1")
        value = (value * 255).astype(np.uint8)
    if value.dtype != np.uint8:
        raise ProtocolError(f"image {name!r} must be uint8, not {value.dtype}")
    return np.ascontiguousarray(value)


def _state(keys: Mapping[str, Any], expected: Expected) -> FloatArray:
    joints, gripper = f"{PREFIX}joint_position", f"{PREFIX}gripper_position"
    for name in ("state", f"{PREFIX}state"):
        if name in keys:
            return _numbers(name, keys[name], (expected.state_dim,))
    if joints in keys:
        values = [np.ravel(np.asarray(keys[name], dtype=object)) for name in (joints, gripper)
                  if name in keys]  # fmt: skip
        return _numbers(joints, np.concatenate(values).tolist(), (expected.state_dim,))
    raise ProtocolError("no state: none of state, observation/state, observation/joint_position")


def _prefix(keys: Mapping[str, Any], expected: Expected) -> ActionPrefix | None:
    """`prev_actions` [≤ horizon, action_dim], absolute, and `inference_delay` in steps."""
    actions = keys.get("prev_actions")
    if actions is None:
        return None
    steps = len(actions) if isinstance(actions, (np.ndarray, list)) else -1
    if not 0 < steps <= expected.horizon:
        raise ProtocolError(f"prev_actions must have 1 to {expected.horizon} steps")
    values = _numbers("prev_actions", actions, (steps, expected.action_dim))
    delay = keys.get("inference_delay", 0)
    if (
        isinstance(delay, bool)
        or not isinstance(delay, (int, np.integer))
        or not 0 <= delay <= steps
    ):
        raise ProtocolError(f"inference_delay must be from 0 to {steps}, not {delay!r:.40}")
    return ActionPrefix(values, int(delay))


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> FloatArray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ProtocolError(f"{name} must be numbers {list(shape)}") from None
    if array.shape != shape:
        raise ProtocolError(f"{name} must have shape {list(shape)}, not {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ProtocolError(f"{name} has a value that is not finite")
    return array


def _text(keys: Mapping[str, Any], name: str, default: str) -> str:
    value = keys.get(name, default)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        raise ProtocolError(f"{name} must be text of at most {MAX_PROMPT} characters")
    return value
