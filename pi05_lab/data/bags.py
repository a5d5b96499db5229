"""Reads rosbag2 bags, intact or damaged, and writes them (MCAP)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike
from rosbags.rosbag2 import Reader, ReaderError, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.stores import ros2_humble as ros

from pi05_ros.types import FloatArray, ImageArray

SUFFIXES = (".mcap", ".db3")
_METADATA = "metadata.yaml"

BAG_VERSION = 8
"""rosbag2's metadata.yaml of Humble to Kilted; 9 is Kilted's own."""


class BagError(ValueError):
    """A bag that cannot be used, or values that a bag cannot hold; one line with the reason."""


@dataclass
class Note:
    """A reason why something was dropped, repaired or missing."""

    text: str
    """As first added."""
    count: int = 1
    first_s: float | None = None
    """Seconds since the recording's start; None if it concerns the whole recording."""


_NUMBER = re.compile(r"(?<![\w.])-?\d+(\.\d+)?(e[+-]?\d+)?(?![\w])")


class Notes:
    """Reasons with their counts, in the order in which they first occurred."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def add(self, text: str, at_s: float | None = None, count: int = 1) -> None:
        """Count a reason; texts that differ only in numbers are the same reason."""
        key = _NUMBER.sub("#", text)
        if key in self._notes:
            self._notes[key].count += count
        else:
            self._notes[key] = Note(text, count, at_s)

    def __iter__(self) -> Iterator[Note]:
        return iter(self._notes.values())

    def __len__(self) -> int:
        return len(self._notes)


def one_line(error: BaseException) -> str:
    """An error's type and text without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@dataclass(frozen=True)
class RawMessage:
    """A recorded message, serialized."""

    topic: str
    kind: str
    """Message type, `sensor_msgs/msg/Image`."""
    receive_ns: int
    data: bytes


def is_bag(path: Path) -> bool:
    """Whether a path is a bag's folder, with or without metadata.yaml, or a bare bag file."""
    if path.is_dir():
        return (path / _METADATA).is_file() or bool(_storage_files(path))
    return path.suffix in SUFFIXES and path.is_file()


class Bag:
    """Reads one rosbag2: MCAP or sqlite3, compressed or not. Messages are not kept in memory.

    Args:
        path: the bag's folder, or one .mcap or .db3 file; BagError for anything else.
        notes: receives what cannot be read.
    """

    def __init__(self, path: Path, notes: Notes) -> None:
        if not is_bag(path):
            raise BagError(f"{path} is not a rosbag2: no {_METADATA}, no .mcap or .db3 file")
        self.path = path
        self._notes = notes

    @cached_property
    def topics(self) -> dict[str, str]:
        """Topic → message type, of topics with messages; BagError if there is none.

        A damaged bag is read to its end.
        """
        found: dict[str, str] = {}
        faults: list[str] = []
        for source in self._sources():
            try:
                with Reader(source) as reader:
                    found |= {c.topic: c.msgtype for c in reader.connections if c.msgcount}
            except Exception as error:  # a damaged file raises whatever its decoders raise
                faults.append(_fault(source, error))
                found |= {m.topic: m.kind for m in _scan(source, faults.append)}
        if not found:
            raise BagError("; ".join(faults) or f"{self.path} has no messages")
        return found

    def messages(self, topics: Collection[str]) -> Iterator[RawMessage]:
        """The messages of these topics in the order in which they were received.

        The files of a split bag follow each other. A damaged file is read as far as possible.
        """
        for source in self._sources():
            yield from self._read(source, topics)

    def _sources(self) -> list[Path]:
        """The bag's folder if it opens, else its files."""
        if not self.path.is_dir():
            return [self.path]
        fault = f"{_METADATA} is missing: the recorder was killed, or the file was not copied"
        if (self.path / _METADATA).is_file():
            try:
                with Reader(self.path):
                    return [self.path]
            except Exception as error:  # a damaged file raises whatever its decoders raise
                fault = _fault(self.path, error)
        if fault not in {note.text for note in self._notes}:
            self._notes.add(fault)
        if files := _storage_files(self.path):
            return files
        raise BagError(f"{self.path} has no .mcap or .db3 file that can be read")

    def _read(self, source: Path, topics: Collection[str]) -> Iterator[RawMessage]:
        last_ns = -1
        try:
            with Reader(source) as reader:
                chosen = [c for c in reader.connections if c.topic in topics]
                # rosbags takes an empty selection as all topics
                for connection, last_ns, data in reader.messages(chosen) if chosen else ():
                    yield RawMessage(connection.topic, connection.msgtype, last_ns, bytes(data))
            return
        except Exception as error:  # a damaged file raises whatever its decoders raise
            fault = _fault(source, error)
        if not any(file.suffix == ".mcap" for file in _storage_files(source)):
            self._notes.add(fault)
        for message in _scan(source, self._notes.add):
            if message.topic in topics and message.receive_ns > last_ns:
                yield message


def _storage_files(source: Path) -> list[Path]:
    """A bag's files in the order of their numbers: bag_2 before bag_10."""
    files = source.iterdir() if source.is_dir() else [source]
    stored = [file for file in files if file.suffix in SUFFIXES]
    return sorted(stored, key=lambda file: (len(file.stem), file.stem))


def _fault(path: Path, error: BaseException) -> str:
    known = isinstance(error, ReaderError)
    return f"{path.name}: {' '.join(str(error).split()) if known else one_line(error)}"


def _scan(source: Path, on_fault: Callable[[str], None]) -> Iterator[RawMessage]:
    """All messages of damaged files, in the order in which they were written."""
    for file in _storage_files(source):
        scan = _scan_mcap if file.suffix == ".mcap" else _scan_sqlite
        yield from scan(file, on_fault)


def _scan_sqlite(path: Path, on_fault: Callable[[str], None]) -> Iterator[RawMessage]:
    try:
        with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as database:
            rows = database.execute("SELECT id, name, type FROM topics")
            kinds = {number: (name, kind) for number, name, kind in rows}
            query = "SELECT topic_id, timestamp, data FROM messages"
            for number, receive_ns, data in database.execute(query):
                if number in kinds:
                    yield RawMessage(*kinds[number], receive_ns, data)
    except sqlite3.Error as error:
        on_fault(f"{_fault(path, error)}; the messages before the damage are used")


MCAP_MAGIC = b"\x89MCAP0\r\n"
_LARGEST_RECORD = 1 << 30


def _scan_mcap(path: Path, on_fault: Callable[[str], None]) -> Iterator[RawMessage]:
    """The messages of each chunk, sorted by their times as by rosbags.

    A recorder that is killed leaves a file without footer and index whose last chunk is cut short.
    rosbags rejects it; all messages before the cut are intact.
    """
    # Imported here, because only reading a damaged bag needs it.
    from mcap.opcode import Opcode
    from mcap.records import Channel, Chunk, Message, Schema
    from mcap.stream_reader import StreamReader, breakup_chunk

    needed = (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.MESSAGE, Opcode.CHUNK)
    kinds = {0: ""}
    channels: dict[int, tuple[str, str]] = {}
    with path.open("rb") as file:
        if file.read(len(MCAP_MAGIC)) != MCAP_MAGIC:
            on_fault(f"{path.name} does not begin like an MCAP file")
            return
        while True:
            begin_mb = file.tell() / 1e6
            head = file.read(9)
            if not head or head == MCAP_MAGIC:
                return
            length = int.from_bytes(head[1:], "little")
            body = file.read(length) if length <= _LARGEST_RECORD else b""
            if len(head) < 9 or len(body) < length:
                on_fault(f"{path.name} is cut short after {begin_mb:.1f} MB; what precedes is used")
                return
            if head[0] not in needed:
                continue
            messages = []
            try:
                # One reader per record: a reader of the file stops at the first damaged record.
                reader = StreamReader(BytesIO(head + body), skip_magic=True, emit_chunks=True)
                record = next(iter(reader.records), None)
                parts = breakup_chunk(record, True) if isinstance(record, Chunk) else [record]
                for part in parts:
                    if isinstance(part, Schema):
                        kinds[part.id] = part.name
                    elif isinstance(part, Channel):
                        channels[part.id] = part.topic, kinds.get(part.schema_id, "")
                    elif isinstance(part, Message) and part.channel_id in channels:
                        topic, kind = channels[part.channel_id]
                        messages.append(RawMessage(topic, kind, part.log_time, part.data))
            except Exception as error:  # whatever a decompressor raises for damaged bytes
                reason = " ".join(str(error).split()) or type(error).__name__
                on_fault(f"{path.name}: the chunk at {begin_mb:.1f} MB is damaged ({reason})")
            yield from sorted(messages, key=lambda message: message.receive_ns)


class BagWriter:
    """Writes one bag, of serialized messages or of values; a context manager closes it.

    The bag's folder `path` must not exist. `definitions` are message type → .msg text, for types
    beyond ROS 2's own.
    """

    def __init__(self, path: Path | str, definitions: Mapping[str, str] | None = None) -> None:
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it or name another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._types = get_typestore(Stores.ROS2_HUMBLE)
        for kind, text in (definitions or {}).items():
            self._types.register(get_types_from_msg(text, kind))
        self._connections: dict[str, Any] = {}
        self._writer = Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()

    def write(self, topic: str, kind: str, received_ns: int, data: bytes | memoryview) -> None:
        """Write one serialized message (CDR) of a type like "std_msgs/msg/String"."""
        if topic not in self._connections:
            connection = self._writer.add_connection(topic, kind, typestore=self._types)
            self._connections[topic] = connection
        self._writer.write(self._connections[topic], received_ns, data)

    def write_text(self, topic: str, time_ns: int, text: str) -> None:
        self._write_message(topic, time_ns, ros.std_msgs__msg__String(text))

    def write_joints(
        self,
        topic: str,
        time_ns: int,
        names: Sequence[str],
        positions: FloatArray,
        velocities: FloatArray | None = None,
    ) -> None:
        """Write a JointState of positions [J] and velocities [J]."""
        position, velocity = _array(positions), _array([] if velocities is None else velocities)
        header, effort = _header(time_ns), _array([])
        message = ros.sensor_msgs__msg__JointState(header, list(names), position, velocity, effort)
        self._write_message(topic, time_ns, message)

    def write_trajectory(
        self,
        topic: str,
        time_ns: int,
        names: Sequence[str],
        positions: FloatArray,
        times_from_start_ns: Sequence[int],
    ) -> None:
        """Write a JointTrajectory of positions [N, J]."""
        points = []
        for row, from_start_ns in zip(positions, times_from_start_ns, strict=True):
            due = ros.builtin_interfaces__msg__Duration(*divmod(from_start_ns, 10**9))
            fields = (_array(row), _array([]), _array([]), _array([]), due)
            points.append(ros.trajectory_msgs__msg__JointTrajectoryPoint(*fields))
        header = _header(time_ns)
        message = ros.trajectory_msgs__msg__JointTrajectory(header, list(names), points)
        self._write_message(topic, time_ns, message)

    def write_image(self, topic: str, time_ns: int, frame_id: str, image: ImageArray) -> None:
        """Write an RGB image [height, width, 3]."""
        height, width, channels = image.shape
        header, data = _header(time_ns, frame_id), np.ascontiguousarray(image).ravel()
        size = (height, width, "rgb8", 0, channels * width)
        self._write_message(topic, time_ns, ros.sensor_msgs__msg__Image(header, *size, data))

    def write_jpeg(
        self,
        topic: str,
        stamp_ns: int,
        frame_id: str,
        image: ImageArray,
        quality: int,
        received_ns: int | None = None,
    ) -> None:
        """Write an RGB image [height, width, 3] as a CompressedImage of quality 0 … 100."""
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].ravel()
        header = _header(stamp_ns, frame_id)
        message = ros.sensor_msgs__msg__CompressedImage(header, "jpeg", data)
        self._write_message(topic, stamp_ns if received_ns is None else received_ns, message)

    def _write_message(self, topic: str, received_ns: int, message: Any) -> None:
        kind = message.__msgtype__
        self.write(topic, kind, received_ns, self._types.serialize_cdr(message, kind))

    def close(self) -> None:
        """Write the index and metadata.yaml."""
        self._writer.close()

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _array(values: ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


def _header(stamp_ns: int, frame_id: str = "") -> Any:
    stamp = ros.builtin_interfaces__msg__Time(*divmod(stamp_ns, 10**9))
    return ros.std_msgs__msg__Header(stamp, frame_id)
