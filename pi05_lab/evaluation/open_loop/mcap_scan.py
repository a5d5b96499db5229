"""Reads an MCAP file from its beginning to where it is damaged: no index is needed.

A recorder that is killed leaves a file without footer and index, the last chunk cut short
(https://mcap.dev/spec). rosbags refuses such a file; all messages before the cut are sound.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from rosbags.rosbag2.storage_mcap import decompress

MAGIC = b"\x89MCAP0\r\n"
_SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x03, 0x04, 0x05, 0x06
_LARGEST_RECORD = 1 << 30
_BEYOND = "a record goes beyond its end"


@dataclass(frozen=True)
class RawMessage:
    """A recorded message, not deserialised."""

    topic: str
    kind: str
    """Message type, `sensor_msgs/msg/Image`."""
    receive_ns: int
    data: bytes


class _Cut(Exception):
    """The file or a chunk ends within a record."""


def scan_mcap(path: Path, on_fault: Callable[[str], None]) -> Iterator[RawMessage]:
    """All messages that can be read, those of one chunk in the order of their times.

    Args:
        path: a file.
        on_fault: told, in one line each, what could not be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            on_fault(f"{path.name} does not begin as an MCAP file does")
            return
        yield from _Scan(path.name, size, on_fault).records(file)


class _Scan:
    def __init__(self, name: str, size: int, on_fault: Callable[[str], None]) -> None:
        self._name = name
        self._size = size
        self._on_fault = on_fault
        self._schemas: dict[int, str] = {0: ""}
        self._channels: dict[int, tuple[str, str]] = {}

    def records(self, file: BinaryIO) -> Iterator[RawMessage]:
        while True:
            begin = file.tell()
            try:
                record = _next_record(file)
            except _Cut:
                self._on_fault(
                    f"{self._name} is cut short after {begin / 1e6:.1f} MB; "
                    "what comes before was used"
                )
                return
            if record is None:
                return
            code, body = record
            if code == _CHUNK:
                yield from self._chunk(body, begin)
            else:
                message = self._take(code, body)
                if message is not None:
                    yield message

    def _chunk(self, body: bytes, begin: int) -> Iterator[RawMessage]:
        messages: list[RawMessage] = []
        try:
            _, _, raw_size, checksum = struct.unpack_from("<QQQI", body)
            compression, offset = _string(body, 28)
            (packed_size,) = struct.unpack_from("<Q", body, offset)
            packed = body[offset + 8 : offset + 8 + packed_size]
            inner = BytesIO(decompress(packed, compression, raw_size, checksum))
            while (record := _next_record(inner)) is not None:
                message = self._take(*record)
                if message is not None:
                    messages.append(message)
        except Exception as error:  # whatever a decompressor raises for damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            self._on_fault(f"{self._name}: a chunk at {begin / 1e6:.1f} MB is damaged ({reason})")
        yield from sorted(messages, key=lambda message: message.receive_ns)

    def _take(self, code: int, body: bytes) -> RawMessage | None:
        if code == _SCHEMA:
            self._schemas[struct.unpack_from("<H", body)[0]] = _string(body, 2)[0]
        elif code == _CHANNEL:
            number, schema = struct.unpack_from("<HH", body)
            self._channels[number] = (_string(body, 4)[0], self._schemas.get(schema, ""))
        elif code == _MESSAGE:
            number, _, log_ns, _ = struct.unpack_from("<HIQQ", body)
            if number in self._channels:
                topic, kind = self._channels[number]
                return RawMessage(topic, kind, log_ns, body[22:])
        return None


def _next_record(file: BinaryIO) -> tuple[int, bytes] | None:
    head = file.read(9)
    if not head or head == MAGIC[: len(head)]:
        return None
    if len(head) < 9:
        raise _Cut(_BEYOND)
    length = struct.unpack_from("<Q", head, 1)[0]
    if length > _LARGEST_RECORD:
        raise _Cut(_BEYOND)
    body = file.read(length)
    if len(body) < length:
        raise _Cut(_BEYOND)
    return head[0], body


def _string(body: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", body, offset)
    end = offset + 4 + length
    return body[offset + 4 : end].decode(), end
