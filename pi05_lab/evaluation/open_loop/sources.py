"""Recorded messages become what the policy node's callbacks would take in."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi05_lab.evaluation.open_loop.bag import Bag, BagError
from pi05_lab.evaluation.open_loop.mcap_scan import RawMessage
from pi05_lab.evaluation.open_loop.notes import Notes
from pi05_lab.evaluation.open_loop.topics import (
    COMMAND_TYPES,
    JOINT_STATE,
    STRING,
    Controller,
    EvaluatedRobot,
)
from pi05_ros.observation.decode import DecodeError, decode_image, decode_joint_state, stamp_s
from pi05_ros.types import FloatArray, ImageArray

OTHER_CLOCK_S = 10.0
"""Header stamps this far from the time of receipt are of another clock, a simulator's say."""
JOINT_GROUP_COMMAND = "string name\nfloat32[] cmd\n"


@dataclass(frozen=True)
class Picture:
    """A camera's picture, not decoded."""

    time_ns: int
    """On the recording's clock, when it was received."""
    stamp_s: float
    camera: str
    payload: Any
    """What `Recording.decode` takes."""
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
    """What the robot is asked to do from here on."""

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


Event = Picture | Joints | Instruction | Command


class Recording(Protocol):
    """Something that was recorded, as events in the order of their receipt."""

    name: str
    notes: Notes

    def events(self) -> Iterator[Event]:
        """May be called once.

        Raises:
            BagError: nothing that could be evaluated.
        """

    def decode(self, payload: Any) -> ImageArray:
        """RGB [height, width, 3] of a `Picture`'s payload."""

    def first_instruction(self) -> str | None:
        """What is asked for first, without reading more than that takes."""

    def commanded(self) -> list[tuple[int, ...]]:
        """Columns of each controller whose commands were recorded, early or late."""


class BagRecording:
    """A rosbag2 through the topics of a params file.

    Args:
        name: of the recording.
        bag: where the messages are.
        robot: topics and joints.
        instruction: replaces those that were recorded; None takes them.
        notes: take what is missing or cannot be used.
    """

    def __init__(
        self,
        name: str,
        bag: Bag,
        robot: EvaluatedRobot,
        notes: Notes,
        instruction: str | None = None,
    ) -> None:
        self.name = name
        self.notes = notes
        self._bag = bag
        self._robot = robot
        self._instruction = instruction
        self._types = get_typestore(Stores.ROS2_HUMBLE)
        kind = COMMAND_TYPES["interbotix"]
        self._types.register(get_types_from_msg(JOINT_GROUP_COMMAND, kind))
        self._start_ns: int | None = None
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
        cameras, controllers = self._choose()
        topics = {
            **dict.fromkeys(cameras),
            **dict.fromkeys(controllers),
            self._robot.joint_topic: 0,
        }
        if self._instruction is None:
            topics.update(dict.fromkeys(self._robot.instruction_topics, 0))
        for raw in self._bag.messages(list(topics)):
            if self._start_ns is None:
                self._start_ns = raw.receive_ns
            event = None
            try:
                event = self._event(raw, cameras, controllers)
            except DecodeError as error:
                self.notes.add(f"{raw.topic}: {error}", self._since_start_s(raw))
            except (struct.error, ValueError, IndexError, KeyError, TypeError) as error:
                self.notes.add(
                    f"{raw.topic}: a message could not be read ({type(error).__name__}: {error})",
                    self._since_start_s(raw),
                )
            if event is None:
                continue
            if self._instruction is not None:
                yield Instruction(event.time_ns, self._instruction, "--instruction")
                self._instruction = None
            yield replace(event, raw=raw)

    def _since_start_s(self, raw: RawMessage) -> float:
        return (raw.receive_ns - (self._start_ns or 0)) * 1e-9

    def _choose(self) -> tuple[dict[str, tuple[str, str]], dict[str, Controller]]:
        """Topic → camera and type; topic → controller; of those that the bag has."""
        has = self._bag.topics
        cameras: dict[str, tuple[str, str]] = {}
        for camera in self._robot.cameras:
            found = [topic for topic, kind in camera.topics.items() if has.get(topic) == kind]
            if found:
                cameras[found[0]] = (camera.name, camera.topics[found[0]])
                if found[0] != next(iter(camera.topics)):
                    self.notes.add(f"camera {camera.name}: {found[0]} was used, as recorded")
                continue
            self._missing(f"camera {camera.name}", camera.topics, camera.required)
        self._missing("joint states", {self._robot.joint_topic: JOINT_STATE}, True)
        if self._instruction is None:
            known = dict.fromkeys(self._robot.instruction_topics, STRING)
            if not any(has.get(topic) == kind for topic, kind in known.items()):
                self._missing("instruction", known, True, "; or give --instruction")
        controllers = self._recorded_controllers()
        for controller in self._robot.controllers:
            if controller.topic not in controllers:
                self.notes.add(
                    f"{controller.topic}: no recorded positions of {controller.name}, "
                    "its joints are compared with their measured positions"
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

    def _missing(
        self, what: str, topics: Mapping[str, str], required: bool, remedy: str = ""
    ) -> None:
        has = self._bag.topics
        if any(has.get(topic) == kind for topic, kind in topics.items()):
            return
        wrong = [f"{topic} is {has[topic]}" for topic in topics if topic in has]
        kind = next(iter(topics.values()))
        there = sorted(topic for topic, held in has.items() if held == kind)
        text = (
            f"{what}: {'; '.join(wrong) or 'no ' + ' or '.join(topics)}, needs {kind}; "
            f"topics of that type: {', '.join(there) or 'none'}; "
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
            self._check(raw, kind)
            seconds, nanoseconds = _serialized_stamp(raw.data)
            time_ns, stamp = self._times(raw, seconds, nanoseconds)
            return Picture(time_ns, stamp, name, (kind, raw.data), raw.topic)
        if raw.topic == self._robot.joint_topic:
            self._check(raw, JOINT_STATE)
            message = self._types.deserialize_cdr(raw.data, JOINT_STATE)
            stamp_s(message.header)
            header = message.header.stamp
            time_ns, stamp = self._times(raw, header.sec, header.nanosec)
            positions = decode_joint_state(message, self._robot.config.joints.names)
            return Joints(time_ns, stamp, positions, raw.topic)
        if raw.topic in controllers:
            return self._command(raw, controllers[raw.topic])
        self._check(raw, STRING)
        text = self._types.deserialize_cdr(raw.data, STRING).data
        return Instruction(self._times(raw, 0, 0, stamped=False)[0], text, raw.topic)

    def _command(self, raw: RawMessage, controller: Controller) -> Command | None:
        kind = COMMAND_TYPES[controller.output]
        self._check(raw, kind)
        message = self._types.deserialize_cdr(raw.data, kind)
        names = self._robot.config.joints.names
        if controller.output != "joint_trajectory":
            values = message.data if controller.output == "forward_position" else message.cmd
            time_ns, start = self._times(raw, 0, 0, stamped=False)
            return self._checked(time_ns, start, [0.0], [values], controller.columns, raw.topic)
        if not message.points:
            return None
        header = message.header.stamp
        time_ns, start = self._times(raw, header.sec, header.nanosec, zero_is_now=True)
        unknown = [name for name in message.joint_names if name not in names]
        if unknown:
            raise DecodeError(f"joint_names: {unknown[0]!r} is not in the params file's joints")
        # one point is a set-point that is in force from its message on, however long the
        # controller may take to get there: data sets date actions so, too
        one = len(message.points) == 1
        times_s = [
            0.0 if one else p.time_from_start.sec + p.time_from_start.nanosec * 1e-9
            for p in message.points
        ]
        columns = tuple(names.index(name) for name in message.joint_names)
        rows = [point.positions for point in message.points]
        return self._checked(time_ns, start, times_s, rows, columns, raw.topic)

    def _checked(
        self,
        time_ns: int,
        start: float,
        times_s: Sequence[float],
        rows: Sequence[Any],
        columns: tuple[int, ...],
        topic: str,
    ) -> Command:
        times = start + np.asarray(times_s, dtype=np.float64)
        positions = np.array([np.asarray(row, dtype=np.float64) for row in rows])
        if positions.shape != (len(times), len(columns)):
            raise DecodeError(f"{positions.shape} positions for {len(columns)} joints")
        if not np.isfinite(positions).all() or (np.diff(times) <= 0).any():
            raise DecodeError("positions that are not finite or times that do not increase")
        return Command(time_ns, start, times, positions, columns, topic)

    def _check(self, raw: RawMessage, kind: str) -> None:
        if raw.kind != kind:
            raise DecodeError(f"a message of type {raw.kind}, needs {kind}")

    def _times(
        self,
        raw: RawMessage,
        seconds: int,
        nanoseconds: int,
        *,
        stamped: bool = True,
        zero_is_now: bool = False,
    ) -> tuple[int, float]:
        """When a message was received and taken, on the clock of the header stamps."""
        zero = seconds == 0 and nanoseconds == 0
        if stamped and not zero and self._other_clock is None:
            distance_s = abs(raw.receive_ns * 1e-9 - (seconds + nanoseconds * 1e-9))
            self._other_clock = distance_s > OTHER_CLOCK_S
            if self._other_clock:
                self.notes.add(
                    f"header stamps are {distance_s:.0f} s from the times of receipt: "
                    "their clock was used, transport is not known"
                )
        receive_ns = raw.receive_ns
        if self._other_clock:
            if stamped and not zero:
                self._newest_ns = max(self._newest_ns, seconds * 1_000_000_000 + nanoseconds)
            receive_ns = self._newest_ns
        if stamped and not zero:
            # the same expression as in the node, so that stamps are equal to the bit
            return receive_ns, float(seconds + nanoseconds * 1e-9)
        if stamped and not zero_is_now and raw.topic not in self._unstamped:
            self._unstamped.add(raw.topic)
            self.notes.add(f"{raw.topic}: header stamps are 0, the times of receipt were used")
        return receive_ns, float(receive_ns // 1_000_000_000 + (receive_ns % 1_000_000_000) * 1e-9)


def _serialized_stamp(data: bytes) -> tuple[int, int]:
    """The stamp of a serialized message that begins with a header, without deserialising it.

    CDR: 4 bytes, the second is 1 for little endian; then int32 sec, uint32 nanosec.
    """
    if len(data) < 12:
        raise DecodeError(f"a serialized message of {len(data)} bytes has no header")
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds, nanoseconds
