"""Raw messages of a rosbag2, sound or damaged, one after the other.

MCAP and sqlite3, compressed or not, a folder with metadata.yaml or a bare file. Nothing is kept, so
a bag may be larger than the memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rosbags.rosbag2 import Reader, ReaderError

from pi05_lab.evaluation.open_loop.mcap_scan import RawMessage, scan_mcap
from pi05_lab.evaluation.open_loop.notes import Notes, one_line

SUFFIXES = (".mcap", ".db3")
_METADATA = "metadata.yaml"


class BagError(ValueError):
    """A recording that cannot be used at all; one line says why."""


def is_bag(path: Path) -> bool:
    """A bag's folder, also one whose recorder never wrote metadata.yaml, or a bare file."""
    if path.is_dir():
        return (path / _METADATA).is_file() or bool(_storage_files(path))
    return path.suffix in SUFFIXES and path.is_file()


class Bag:
    """One rosbag2.

    Args:
        path: its folder, or one .mcap or .db3 file.
        notes: take what could not be read.

    Raises:
        BagError: there is no bag.
    """

    def __init__(self, path: Path, notes: Notes) -> None:
        if not is_bag(path):
            raise BagError(f"{path} is no rosbag2: no {_METADATA}, no .mcap or .db3 file")
        self.path = path
        self._notes = notes
        self._topics: dict[str, str] | None = None

    @property
    def topics(self) -> dict[str, str]:
        """Topic → message type of what the bag says that it has; a damaged one is read for it.

        Raises:
            BagError: nothing of it can be read.
        """
        if self._topics is None:
            found: dict[str, str] = {}
            faults: list[str] = []
            for source in self._sources():
                found.update(source.topics(faults.append))
            if not found:
                raise BagError("; ".join(faults) or f"{self.path} has no messages")
            self._topics = found
        return self._topics

    def messages(self, topics: Collection[str]) -> Iterator[RawMessage]:
        """The messages of these topics in the order in which they were received.

        Several files of one bag follow each other; a damaged one is read as far as it goes.
        """
        wanted = frozenset(topics)
        for source in self._sources():
            yield from source.messages(wanted, self._notes)

    def _sources(self) -> list[_Source]:
        """The bag as a whole if it opens, else its files one by one."""
        if self.path.is_dir() and (self.path / _METADATA).is_file():
            whole = _Source(self.path)
            fault = whole.fault()
            if fault is None:
                return [whole]
            self._note_once(fault)
        elif self.path.is_dir():
            self._note_once(
                f"{_METADATA} is missing: the recorder was killed, or it was not copied"
            )
        files = _storage_files(self.path) if self.path.is_dir() else [self.path]
        if not files:
            raise BagError(f"{self.path} has no .mcap or .db3 file that can be read")
        return [_Source(file) for file in files]

    def _note_once(self, text: str) -> None:
        if text not in {note.text for note in self._notes}:
            self._notes.add(text)


class _Source:
    """A bag's folder or one of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fault(self) -> str | None:
        """Why rosbags cannot open it."""
        try:
            with Reader(self.path):
                return None
        except Exception as error:  # damaged files raise what their decoders raise
            return f"{self.path.name}: {_reason(error)}"

    def topics(self, on_fault: Callable[[str], None]) -> dict[str, str]:
        fault = self.fault()
        if fault is None:
            with Reader(self.path) as reader:
                return {c.topic: c.msgtype for c in reader.connections if c.msgcount}
        on_fault(fault)
        found: dict[str, str] = {}
        if self.path.suffix == ".db3":
            with suppress(sqlite3.Error), closing(_database(self.path)) as database:
                found.update(database.execute("SELECT name, type FROM topics"))
            return found
        for message in scan_mcap(self.path, on_fault):
            found.setdefault(message.topic, message.kind)
        return found

    def messages(self, topics: frozenset[str], notes: Notes) -> Iterator[RawMessage]:
        fault = self.fault()
        last_ns = -1
        if fault is None:
            try:
                with Reader(self.path) as reader:
                    chosen = [c for c in reader.connections if c.topic in topics]
                    for message in _read(reader, chosen):
                        last_ns = message.receive_ns
                        yield message
                return
            except Exception as error:  # damaged data behind a sound index
                fault = f"{self.path.name}: {_reason(error)}"
        if self.path.suffix == ".mcap":
            yield from self._scanned(self.path, topics, notes, last_ns)
            return
        files = _storage_files(self.path) if self.path.is_dir() else []
        if any(file.suffix == ".mcap" for file in files):
            for file in files:
                yield from self._scanned(file, topics, notes, last_ns)
            return
        notes.add(fault)
        for file in [self.path] if self.path.suffix == ".db3" else files:
            yield from _walk_sqlite(file, topics, notes, last_ns)

    def _scanned(
        self, path: Path, topics: frozenset[str], notes: Notes, after_ns: int
    ) -> Iterator[RawMessage]:
        for message in scan_mcap(path, notes.add):
            if message.topic in topics and message.receive_ns > after_ns:
                yield message


def _read(reader: Reader, connections: list[Any]) -> Iterator[RawMessage]:
    if not connections:
        return
    for connection, receive_ns, data in reader.messages(connections):
        yield RawMessage(connection.topic, connection.msgtype, receive_ns, bytes(data))


def _walk_sqlite(
    path: Path, topics: frozenset[str], notes: Notes, after_ns: int
) -> Iterator[RawMessage]:
    """The rows of a damaged database in the order in which they were written."""
    try:
        with closing(_database(path)) as database:
            rows = database.execute("SELECT id, name, type FROM topics")
            kinds = {number: (name, kind) for number, name, kind in rows if name in topics}
            for number, receive_ns, data in database.execute(
                "SELECT topic_id, timestamp, data FROM messages"
            ):
                if number in kinds and receive_ns > after_ns:
                    yield RawMessage(*kinds[number], receive_ns, data)
    except sqlite3.Error as error:
        notes.add(f"{path.name}: {_reason(error)}; what comes before was used")


def _database(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?immutable=1", uri=True)


def _storage_files(folder: Path) -> list[Path]:
    return sorted(
        (file for file in folder.iterdir() if file.suffix in SUFFIXES),
        key=lambda file: (len(file.stem), file.stem),
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) if isinstance(error, ReaderError) else one_line(error)
