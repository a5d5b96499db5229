"""A policy on another machine: a client of openpi's websocket protocol. Needs no torch.

Reads the servers of openpi, of this package, of SGLang and of vllm-omni. The executor's thread
waits for the answer, so the control thread never does. Sources: openpi
`openpi_client/websocket_client_policy.py` and the dialects in `server/dialects.py`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from pi05_ros.policy.robots import Robot, RobotSource, read_robot
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.protocol import ProtocolError, pack, text_keys, unpack
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, Observation

API_KEY = "PI05_API_KEY"
"""Environment variable of the key that a server wants."""
SCHEMES = ("ws://", "wss://")
ANSWER_TIMEOUT_S = 1.5
"""Of an inference; below the node's `faults.hang_timeout_s`."""
LOAD_TIMEOUT_S = 30.0
"""Of the first inference: a server may compile in it."""
MAX_BACK_OFF_S = 1.0
CLOSE_TIMEOUT_S = 0.2
MAX_MESSAGE_BYTES = 64 * 2**20
DROID, LIBERO = "droid", "libero"
logger = logging.getLogger(__name__)


class RemoteError(RuntimeError):
    """The server is gone, does not answer in time, or answers with an error; one line."""


class RemotePolicy:
    """The policy of a server; implements `pi05_ros.types.Policy`. For one thread at a time.

    After an error the connection is closed, so a late answer is never taken for the next one; the
    next inference connects again, after a growing pause.
    """

    def __init__(
        self,
        address: str,
        robot: RobotSource = "aloha",
        api_key: str = "",
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """Connect, check the server against the robot, and infer once on black images.

        Args:
            address: `ws://host:port`, `wss://…`, with the path of a dialect if need be.
            robot: as in `Policy.from_pretrained`; its state and actions are sent as they are.
            api_key: sent as `Authorization: Api-Key …`.
            answer_timeout_s: of an inference.

        Raises:
            CheckpointError: no server there, or its policy does not fit the robot.
            ValueError: unknown robot.
        """
        self._address, self._api_key = address, api_key
        self._timeout_s = answer_timeout_s
        self._robot: Robot = read_robot(robot)
        self._connection: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self._failures = 0
        self._retry_at_s = 0.0
        try:
            self.metadata = self._connect(LOAD_TIMEOUT_S)
            self._check_metadata()
            probe = self._exchange(self._message(self._black(), None), LOAD_TIMEOUT_S)
            actions = self._actions(probe)
        except RemoteError as error:
            raise CheckpointError(str(error)) from None
        self.horizon = len(actions)

    @property
    def dt_s(self) -> float:
        return float(self.metadata.get("dt_s") or self._robot.dt_s)

    @property
    def state_dim(self) -> int:
        return self._robot.state_dim

    @property
    def action_dim(self) -> int:
        return self._robot.action_dim

    @property
    def robot_name(self) -> str:
        return self._robot.name

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the action's values in the robot's description."""
        return self._robot.action_names

    @property
    def cameras(self) -> tuple[str, ...]:
        """The server's where it names them, else the robot's."""
        named = self.metadata.get("cameras")
        return tuple(map(str, named)) if isinstance(named, list) else tuple(self._robot.cameras)

    @property
    def description(self) -> str:
        policy = self.metadata.get("policy") or self.metadata.get("model") or "a policy"
        return f"{policy} at {self._address}"

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """Request a chunk and wait for it.

        Args:
            observation: in robot units; images of unknown cameras are an error.
            prefix: sent as `prev_actions`, if the server continues prefixes.

        Returns:
            [horizon, action_dim] in robot units, with the times of the wire, the server's queue and
            the policy.

        Raises:
            RemoteError: no answer in time, or none that is a chunk.
            ValueError: a prefix for a server that does not continue it, or a bad observation.
        """
        for name in observation.images:
            if name not in self.cameras:
                raise ValueError(
                    f"unknown camera {name!r}; the server's are {', '.join(self.cameras)}"
                )
        started_s = time.perf_counter()
        answer = self._exchange(self._message(observation, prefix), self._timeout_s)
        total_s = time.perf_counter() - started_s
        actions = self._actions(answer)
        if len(actions) != self.horizon:
            raise RemoteError(
                f"{self._address}: a chunk of {len(actions)} steps, the first one had "
                f"{self.horizon}"
            )
        return ActionChunk(
            actions=actions,
            stamp_s=observation.stamp_s,
            dt_s=self.dt_s,
            instruction=observation.instruction,
            timings_s=_timings_s(answer, total_s),
        )

    def close(self) -> None:
        """Close the connection; the next inference opens another."""
        self._connection = None
        self._open.close()

    def _connect(self, timeout_s: float) -> dict[str, Any]:
        """Open a connection and read the metadata."""
        headers = {"Authorization": f"Api-Key {self._api_key}"} if self._api_key else None
        try:
            self._connection = self._open.enter_context(
                connect(
                    self._address,
                    additional_headers=headers,
                    compression=None,
                    max_size=MAX_MESSAGE_BYTES,
                    open_timeout=timeout_s,
                    close_timeout=CLOSE_TIMEOUT_S,
                    proxy=None,
                )
            )
            message = unpack(_binary(self._connection.recv(timeout_s)))
            return text_keys(message)
        except InvalidStatus as error:
            status = error.response.status_code
            hint = ": set PI05_API_KEY" if status == 401 else ""
            raise RemoteError(
                f"{self._address} refuses the connection, HTTP {status}{hint}"
            ) from None
        except (OSError, WebSocketException, TimeoutError, ProtocolError) as error:
            self.close()
            raise RemoteError(f"no policy server at {self._address}: {_line(error)}") from None

    def _exchange(self, message: Mapping[str, Any], timeout_s: float) -> Any:
        """Send a request and return the unpacked answer; reconnects first if need be."""
        end_s = time.monotonic() + timeout_s
        if self._connection is None:
            self._reconnect(end_s)
        assert self._connection is not None
        try:
            self._connection.send(pack(message))
            data = self._connection.recv(max(0.0, end_s - time.monotonic()))
            if isinstance(data, str):
                raise RemoteError(f"{self._address}: {_first(data)}")
            answer = unpack(data)
        except RemoteError:
            self._fail()
            raise
        except TimeoutError:
            self._fail()
            raise RemoteError(f"{self._address}: no answer in {timeout_s:g} s") from None
        except (OSError, WebSocketException, ProtocolError) as error:
            self._fail()
            raise RemoteError(f"{self._address}: {_line(error)}") from None
        self._failures = 0
        return answer

    def _reconnect(self, end_s: float) -> None:
        """Connect again, not before the pause after the last failure is over."""
        pause_s = self._retry_at_s - time.monotonic()
        if pause_s > 0:
            time.sleep(min(pause_s, max(0.0, end_s - time.monotonic())))
        try:
            self._connect(max(0.1, end_s - time.monotonic()))
        except RemoteError:
            self._fail()
            raise
        logger.info("connected again to %s", self._address)

    def _fail(self) -> None:
        self.close()
        self._failures += 1
        back_off_s = min(MAX_BACK_OFF_S, 0.1 * 2 ** min(self._failures, 8))
        self._retry_at_s = time.monotonic() + back_off_s

    def _check_metadata(self) -> None:
        """Raise RemoteError where the server says that its policy is another robot's."""
        for key, mine in (
            ("robot", self._robot.name),
            ("state_dim", self.state_dim),
            ("action_dim", self.action_dim),
        ):
            theirs = self.metadata.get(key)
            if theirs not in (None, "", mine) and not str(theirs).endswith((".yaml", ".yml")):
                raise RemoteError(
                    f"{self._address}: the server's {key} is {theirs!r}, robot "
                    f"{self._robot.name!r} has {mine!r}"
                )

    def _message(self, observation: Observation, prefix: ActionPrefix | None) -> dict[str, Any]:
        if prefix is not None and not self.continues_prefixes:
            raise ValueError(
                f"{self._address} does not continue a prefix: use another scheduler than rtc"
            )
        message = self._observation(observation)
        if prefix is not None:
            message["prev_actions"] = prefix.actions.astype(np.float32)
            message["inference_delay"] = prefix.committed_steps
        return message

    @property
    def continues_prefixes(self) -> bool:
        """Whether the server says so."""
        capabilities = self.metadata.get("capabilities")
        return isinstance(capabilities, Mapping) and bool(capabilities.get("prev_actions"))

    def _observation(self, observation: Observation) -> dict[str, Any]:
        """By the robot's keys in openpi; this package's server takes all of them."""
        state = observation.state.astype(np.float32)
        images = {name: np.ascontiguousarray(image) for name, image in observation.images.items()}
        prompt = {"prompt": observation.instruction}
        if self._robot.name in (DROID, LIBERO):
            keys: dict[str, Any] = {f"observation/{name}": i for name, i in images.items()}
            if self._robot.name == LIBERO:
                return keys | {"observation/state": state} | prompt
            joints = {"observation/joint_position": state[:-1]}
            return keys | joints | {"observation/gripper_position": state[-1:]} | prompt
        first = {name: image.transpose(2, 0, 1) for name, image in images.items()}
        return {"images": first, "state": state} | prompt

    def _actions(self, answer: Any) -> FloatArray:
        """[horizon, action_dim] of an answer: a map with `actions`, or the array itself."""
        actions = answer
        if isinstance(answer, Mapping):
            keys = text_keys(answer)
            error = keys.get("error") or (
                keys.get("message") if keys.get("type") == "error" else ""
            )
            if error:
                self._fail()
                raise RemoteError(f"{self._address}: {_first(str(error))}")
            actions = keys.get("actions")
        try:
            array = np.array(actions, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.ndim != 2 or array.shape[1] < self.action_dim or len(array) < 2:
            raise RemoteError(
                f"{self._address}: actions of shape {list(array.shape)}, must be [steps, "
                f"{self.action_dim}]"
            )
        return array[:, : self.action_dim]

    def _black(self) -> Observation:
        images = {name: np.zeros((224, 224, 3), np.uint8) for name in self.cameras}
        return Observation(images, np.zeros(self.state_dim), "warm up", 0.0)


def is_address(checkpoint: object) -> bool:
    """Whether a checkpoint is the address of a policy server."""
    return isinstance(checkpoint, str) and checkpoint.startswith(SCHEMES)


def _timings_s(answer: Any, total_s: float) -> dict[str, float]:
    """Times of the wire, the server around the policy, and the policy, as far as it says."""

    def milliseconds(part: str) -> float:
        found = keys.get(part)
        value = text_keys(found).get("infer_ms") if isinstance(found, Mapping) else None
        if not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            return 0.0
        return max(0.0, float(value)) / 1e3

    keys = text_keys(answer) if isinstance(answer, Mapping) else {}
    policy_s = milliseconds("policy_timing")
    server_s = max(policy_s, milliseconds("server_timing"))
    wire_s = max(0.0, total_s - server_s)
    return {"wire": wire_s, "server": server_s - policy_s, "policy": policy_s}


def _binary(data: str | bytes) -> bytes:
    if isinstance(data, str):
        raise ProtocolError(f"text in place of the metadata: {_first(data)}")
    return data


def _first(text: str) -> str:
    """The last line of a traceback says what happened; of other texts the first one."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "an error without a text"
    return (lines[-1] if lines[0].startswith("Traceback") else lines[0])[:300]


def _line(error: BaseException) -> str:
    return _first(str(error) or type(error).__name__)
