"""Recordings, rosbag2 or LeRobot dataset, as the events that the policy node would receive."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi05_lab.data.bags import Bag, BagError, Notes, RawMessage
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import ACTION_KEY, STATE_KEY, DatasetError
from pi05_lab.data.topics import (
    COMMAND_TYPES,
    JOINT_STATE,
    STRING,
    Controller,
    EvaluatedRobot,
)
from pi05_ros.observation.decode import DecodeError, decode_image, decode_joint_state, stamp_s
from pi05_ros.types import FloatArray, ImageArray

OTHER_CLOCK_S = 10.0
"""Header stamps this far from the receive times are of another clock, for example a simulator's."""
JOINT_GROUP_COMMAND = "string name\nfloat32[] cmd\n"
DATASET_START_S = 1.0
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class CameraImage:
    """A camera image, not decoded."""

    time_ns: int
    """Receive time, on the recording's clock."""
    stamp_s: float
    camera: str
    payload: Any
    """For `Recording.decode`."""
    topic: str
    raw: RawMessage | None = None


@dataclass(frozen=True)
class Joints:
    """Measured positions [n_joints], rad and m."""

    time_ns: int
    stamp_s: float
    positions: FloatArray
    topic: str
    raw: RawMessage | None = None


@dataclass(frozen=True)
class Instruction:
    """The instruction from here on."""

    time_ns: int
    text: str
    topic: str
    raw: RawMessage | None = None


@dataclass(frozen=True)
class Command:
    """A controller's command: one set-point dated by its message, or points with a time each."""

    time_ns: int
    start_s: float
    times_s: FloatArray
    """[n]"""
    positions: FloatArray
    """[n, len(columns)] rad and m."""
    columns: tuple[int, ...]
    topic: str
    raw: RawMessage | None = None


Event = CameraImage | Joints | Instruction | Command


class Recording(Protocol):
    """Something recorded, as events in the order of their receipt."""

    name: str
    notes: Notes

    def events(self) -> Iterator[Event]:
        """The events, once.

        Raises:
            BagError: the recording cannot be evaluated.
        """

    def decode(self, payload: Any) -> ImageArray:
        """RGB [height, width, 3] of a `CameraImage`'s payload."""

    def first_instruction(self) -> str | None:
        """The first instruction; reads no further."""

    def commanded(self) -> list[tuple[int, ...]]:
        """Columns of each controller whose commands were recorded, early or late."""


class DatasetRecording:
    """One episode of a LeRobot dataset; state and action are in the policy's units.

    Raises:
        BagError: no usable dataset, no such episode, or not the robot's joints and cameras.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        episode: int,
        robot: EvaluatedRobot,
        notes: Notes,
        instruction: str | None = None,
    ) -> None:
        self.name, self.notes, self._instruction = name, notes, instruction
        self._joints = robot.config.joints
        try:
            self._data = LeRobotDataset(root, cache_bytes=_CACHE_BYTES)
            self._frames = range(*self._data.bounds(episode))
        except DatasetError as error:
            raise BagError(str(error)) from None
        count = len(self._joints)
        for key, dim in (("state", self._data.state_dim), ("action", self._data.action_dim)):
            if dim != count:
                raise BagError(f"{root}: {key} has {dim} values, the params file {count} joints")
        for key in (STATE_KEY, ACTION_KEY):
            misplaced = self._data.meta.misplaced(key, self._joints.names)
            if misplaced:
                raise BagError(f"{root}: {key} has other joints than the params file: {misplaced}")
        self._cameras = [c.name for c in robot.cameras if c.name in self._data.cameras]
        if missing := [c.name for c in robot.cameras if c.required and c.name not in self._cameras]:
            raise BagError(f"{root} has no camera {missing[0]!r}; it has {self._data.cameras}")

    def decode(self, payload: Any) -> ImageArray:
        frame, camera = payload
        return self._data.images(frame, (camera,))[camera]

    def first_instruction(self) -> str | None:
        return self._instruction or self._data.task(self._frames[0])

    def commanded(self) -> list[tuple[int, ...]]:
        return [tuple(range(len(self._joints)))]

    def events(self) -> Iterator[Event]:
        (columns,) = self.commanded()
        current = ""
        for k, frame in enumerate(self._frames):
            stamp_s = DATASET_START_S + k / self._data.fps
            time_ns = round(stamp_s * 1e9)
            text = self._instruction or self._data.task(frame)
            if text != current:
                current = text
                yield Instruction(time_ns, text, "task")
            yield Joints(time_ns, stamp_s, self._positions(self._data.state[frame]), "state")
            for camera in self._cameras:
                yield CameraImage(time_ns, stamp_s, camera, (frame, camera), camera)
            positions = self._positions(self._data.action[frame])[None]
            times_s = np.array([stamp_s])
            yield Command(time_ns, stamp_s, times_s, positions, columns, "action")

    def _positions(self, values: Any) -> FloatArray:
        return self._joints.to_joints(np.asarray(values, dtype=np.float64))


class BagRecording:
    """A rosbag2 through the topics of a params file.

    `instruction` replaces the recorded ones; `notes` collects what is missing or unusable.
    """

    def __init__(
        self,
        name: str,
        bag: Bag,
        robot: EvaluatedRobot,
        notes: Notes,
        instruction: str | None = None,
    ) -> None:
        self.name, self.notes, self._instruction = name, notes, instruction
        self._bag, self._robot = bag, robot
        self._types = get_typestore(Stores.ROS2_HUMBLE)
        kind = COMMAND_TYPES["interbotix"]
        self._types.register(get_types_from_msg(JOINT_GROUP_COMMAND, kind))
        self._other_clock: bool | None = None
        self._newest_ns = 0
        self._unstamped: set[str] = set()

    def decode(self, payload: Any) -> ImageArray:
        kind, data = payload
        return decode_image(self._types.deserialize_cdr(data, kind))

    def first_instruction(self) -> str | None:
        if self._instruction is not None:
            return self._instruction
        for raw in self._bag.messages(self._robot.instruction_topics):
            if raw.kind == STRING:
                return str(self._types.deserialize_cdr(raw.data, STRING).data)
        return None

    def commanded(self) -> list[tuple[int, ...]]:
        return [controller.columns for controller in self._recorded_controllers().values()]

    def events(self) -> Iterator[Event]:
        cameras, controllers = self._choose_topics()
        topics = [*cameras, *controllers, self._robot.joint_topic]
        if self._instruction is None:
            topics += self._robot.instruction_topics
        start_ns: int | None = None
        for raw in self._bag.messages(topics):
            start_ns = raw.receive_ns if start_ns is None else start_ns
            at_s = (raw.receive_ns - start_ns) * 1e-9
            event = None
            try:
                event = self._event(raw, cameras, controllers)
            except DecodeError as error:
                self.notes.add(f"{raw.topic}: {error}", at_s)
            except (struct.error, ValueError, IndexError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                self.notes.add(f"{raw.topic}: a message could not be read ({reason})", at_s)
            if event is None:
                continue
            if self._instruction is not None:
                yield Instruction(event.time_ns, self._instruction, "--instruction")
                self._instruction = None
            yield replace(event, raw=raw)

    def _choose_topics(self) -> tuple[dict[str, tuple[str, str]], dict[str, Controller]]:
        """Topic → camera and type; topic → controller; of those that the bag has."""
        has = self._bag.topics
        cameras: dict[str, tuple[str, str]] = {}
        for camera in self._robot.cameras:
            found = [topic for topic, kind in camera.topics.items() if has.get(topic) == kind]
            if not found:
                self._note_missing(f"camera {camera.name}", camera.topics, camera.required)
                continue
            cameras[found[0]] = (camera.name, camera.topics[found[0]])
            if found[0] != next(iter(camera.topics)):
                self.notes.add(f"camera {camera.name}: {found[0]} was used, as recorded")
        self._note_missing("joint states", {self._robot.joint_topic: JOINT_STATE}, True)
        if self._instruction is None:
            known = dict.fromkeys(self._robot.instruction_topics, STRING)
            self._note_missing("instruction", known, True, "; or give --instruction")
        controllers = self._recorded_controllers()
        for controller in self._robot.controllers:
            if controller.topic not in controllers:
                self.notes.add(
                    f"{controller.topic}: no recorded positions of {controller.name}, "
                    "the measured positions of its joints stand for them"
                )
        return cameras, controllers

    def _recorded_controllers(self) -> dict[str, Controller]:
        """Topic → controller, of those whose commands the bag has."""
        has = self._bag.topics
        return {
            controller.topic: controller
            for controller in self._robot.controllers
            if controller.output in COMMAND_TYPES
            and has.get(controller.topic) == COMMAND_TYPES[controller.output]
        }

    def _note_missing(
        self, what: str, topics: Mapping[str, str], required: bool, remedy: str = ""
    ) -> None:
        """Note, or raise BagError where it is required, that the bag has none of these topics."""
        has = self._bag.topics
        if any(has.get(topic) == kind for topic, kind in topics.items()):
            return
        wrong = [f"{topic} is {has[topic]}" for topic in topics if topic in has]
        kind = next(iter(topics.values()))
        alternatives = sorted(topic for topic, held in has.items() if held == kind)
        text = (
            f"{what}: {'; '.join(wrong) or 'no ' + ' or '.join(topics)}, needs {kind}; "
            f"topics of that type: {', '.join(alternatives) or 'none'}; "
            f"correct the params file, give --namespace or record it{remedy}"
        )
        if required:
            raise BagError(text)
        self.notes.add(text)

    def _event(
        self,
        raw: RawMessage,
        cameras: Mapping[str, tuple[str, str]],
        controllers: Mapping[str, Controller],
    ) -> Event | None:
        if raw.topic in cameras:
            name, kind = cameras[raw.topic]
            _check_type(raw, kind)
            time_ns, stamp = self._times(raw, _serialized_stamp(raw.data))
            return CameraImage(time_ns, stamp, name, (kind, raw.data), raw.topic)
        if raw.topic == self._robot.joint_topic:
            _check_type(raw, JOINT_STATE)
            message = self._types.deserialize_cdr(raw.data, JOINT_STATE)
            stamp_s(message.header)
            header = message.header.stamp
            time_ns, stamp = self._times(raw, (header.sec, header.nanosec))
            positions = decode_joint_state(message, self._robot.config.joints.names)
            return Joints(time_ns, stamp, positions, raw.topic)
        if raw.topic in controllers:
            return self._command(raw, controllers[raw.topic])
        _check_type(raw, STRING)
        text = self._types.deserialize_cdr(raw.data, STRING).data
        return Instruction(self._times(raw)[0], text, raw.topic)

    def _command(self, raw: RawMessage, controller: Controller) -> Command | None:
        kind = COMMAND_TYPES[controller.output]
        _check_type(raw, kind)
        message = self._types.deserialize_cdr(raw.data, kind)
        if controller.output != "joint_trajectory":
            time_ns, start_s = self._times(raw)
            values = message.data if controller.output == "forward_position" else message.cmd
            times_s, rows, columns = [0.0], [values], controller.columns
        elif not message.points:
            return None
        else:
            header = message.header.stamp
            time_ns, start_s = self._times(raw, (header.sec, header.nanosec), zero_is_now=True)
            names = self._robot.config.joints.names
            if unknown := [name for name in message.joint_names if name not in names]:
                raise DecodeError(f"joint_names: {unknown[0]!r} is not in the params file's joints")
            columns = tuple(names.index(name) for name in message.joint_names)
            rows = [point.positions for point in message.points]
            times_s = [
                p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points
            ]
            if len(rows) == 1:
                # A set-point in force from its message on, however long the controller may take
                # to reach it: datasets date actions the same way.
                times_s = [0.0]
        times = start_s + np.asarray(times_s, dtype=np.float64)
        positions = np.array([np.asarray(row, dtype=np.float64) for row in rows])
        if positions.shape != (len(times), len(columns)):
            raise DecodeError(f"{positions.shape} positions for {len(columns)} joints")
        if not np.isfinite(positions).all() or (np.diff(times) <= 0).any():
            raise DecodeError("positions that are not finite or times that do not increase")
        return Command(time_ns, start_s, times, positions, columns, raw.topic)

    def _times(
        self, raw: RawMessage, stamp: tuple[int, int] | None = None, zero_is_now: bool = False
    ) -> tuple[int, float]:
        """Receive time in ns and stamp in s, both on the clock of the header stamps.

        `stamp` is the header's, in s and ns, None for a message without one. `zero_is_now` means
        that a stamp of 0 stands for the receive time and needs no note.
        """
        seconds, nanoseconds = stamp or (0, 0)
        stamped = seconds != 0 or nanoseconds != 0
        if stamped and self._other_clock is None:
            distance_s = abs(raw.receive_ns * 1e-9 - (seconds + nanoseconds * 1e-9))
            self._other_clock = distance_s > OTHER_CLOCK_S
            if self._other_clock:
                self.notes.add(
                    f"header stamps are {distance_s:.0f} s from the times of receipt: "
                    "their clock was used, transport is not known"
                )
        receive_ns = raw.receive_ns
        if self._other_clock:
            if stamped:
                self._newest_ns = max(self._newest_ns, seconds * 1_000_000_000 + nanoseconds)
            receive_ns = self._newest_ns
        if stamped:
            # The same expression as in the node: stamps are equal to the bit.
            return receive_ns, float(seconds + nanoseconds * 1e-9)
        if stamp is not None and not zero_is_now and raw.topic not in self._unstamped:
            self._unstamped.add(raw.topic)
            self.notes.add(f"{raw.topic}: header stamps are 0, the times of receipt were used")
        return receive_ns, float(receive_ns // 1_000_000_000 + (receive_ns % 1_000_000_000) * 1e-9)


def _check_type(raw: RawMessage, kind: str) -> None:
    if raw.kind != kind:
        raise DecodeError(f"a message of type {raw.kind}, needs {kind}")


def _serialized_stamp(data: bytes) -> tuple[int, int]:
    """The stamp of a serialized message that begins with a header, without deserialising it.

    CDR: 4 bytes, the second is 1 for little endian; then int32 sec, uint32 nanosec.
    """
    if len(data) < 12:
        raise DecodeError(f"a serialized message of {len(data)} bytes has no header")
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds, nanoseconds
