"""Faults pinned: a damaged bag that ends an evaluation, or is silently read as if it were whole."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from mcap.reader import make_reader
from rosbags.convert import convert

from pi05_lab.data.bags import Bag, BagError, Notes, RawMessage, is_bag
from pi05_lab.data.robot_bag import RobotBagWriter

JOINT_TOPIC = "/joint_states"
COUNT = 100


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "bag"
    with RobotBagWriter(path, ("elbow",), {"arm_controller": ("elbow",)}, 0.02) as writer:
        for k in range(COUNT):
            image, joints = np.full((12, 16, 3), k, np.uint8), np.array([0.01 * k])
            writer.write(100 + k / 50, {"top": image}, joints, joints, joints, "wave")
    return path


def read(path: Path, *topics: str) -> tuple[list[RawMessage], list[str]]:
    notes = Notes()
    found = list(Bag(path, notes).messages(topics or (JOINT_TOPIC,)))
    return found, [note.text for note in notes]


def mcap_file(bag: Path) -> Path:
    return next(bag.glob("*.mcap"))


def copy(bag: Path, target: Path) -> Path:
    shutil.copytree(bag, target)
    return target


def test_a_sound_bag_is_read_in_order_and_without_notes(bag: Path) -> None:
    messages, notes = read(bag, JOINT_TOPIC, "/top/image_raw")
    assert len(messages) == 2 * COUNT and notes == []
    times = [message.receive_ns for message in messages]
    assert times == sorted(times)
    assert Bag(bag, Notes()).topics[JOINT_TOPIC] == "sensor_msgs/msg/JointState"


def test_a_bare_file_is_a_bag(bag: Path) -> None:
    messages, notes = read(mcap_file(bag))
    assert len(messages) == COUNT and notes == []


def test_without_metadata_the_files_are_read_with_a_note(bag: Path, tmp_path: Path) -> None:
    broken = copy(bag, tmp_path / "bag")
    (broken / "metadata.yaml").unlink()
    messages, notes = read(broken)
    assert len(messages) == COUNT
    assert len(notes) == 1 and "metadata.yaml is missing" in notes[0]


@pytest.mark.parametrize("keep", [0.35, 0.8, 0.999])
def test_a_file_that_was_cut_is_read_up_to_the_cut(bag: Path, tmp_path: Path, keep: float) -> None:
    """A recorder that is killed leaves neither footer nor index."""
    broken = _small_chunks(bag, tmp_path / "bag")
    whole, _ = read(broken)
    assert len(whole) == COUNT
    file = mcap_file(broken)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    messages, notes = read(broken)
    assert 0 < len(messages) <= COUNT
    assert [m.data for m in messages] == [m.data for m in whole[: len(messages)]]
    assert any("cut short" in note for note in notes) or keep > 0.99
    assert any(file.name in note for note in notes)


@pytest.mark.parametrize("place", ["chunk", "index"])
def test_damage_costs_the_messages_of_its_chunk_alone(
    bag: Path, tmp_path: Path, place: str
) -> None:
    broken = _small_chunks(bag, tmp_path / "bag")
    file = mcap_file(broken)
    with file.open("rb") as stream:
        summary = make_reader(stream).get_summary()
    assert summary is not None
    chunk = summary.chunk_indexes[2]
    begin, end = chunk.chunk_start_offset, chunk.chunk_start_offset + chunk.chunk_length
    data = bytearray(file.read_bytes())
    if place == "chunk":
        data[(begin + end) // 2 : end] = b"\xff" * (end - (begin + end) // 2)
    else:  # the number of entries, behind the record's code, length and channel
        data[end + 11 : end + 15] = b"\xff" * 4
        data = data[:-50]  # without its footer rosbags does not open the file
    file.write_bytes(data)
    messages, notes = read(broken)
    assert len(messages) == COUNT if place == "index" else COUNT / 2 < len(messages) < COUNT
    assert messages[-1].receive_ns == read(bag)[0][-1].receive_ns
    assert any("is damaged" in note for note in notes) == (place == "chunk")


def test_sqlite_and_compressed_bags_are_read(bag: Path, tmp_path: Path) -> None:
    for name, options in (
        ("plain", {}),
        ("zstd", {"compress": "zstd", "compress_mode": "message"}),
    ):
        target = tmp_path / name
        convert(
            [bag], target, dst_storage="sqlite3", dst_version=8, default_typestore=None,
            typestore=None, **{"compress": None, "compress_mode": "none", **options},
            exclude_topics=(), include_topics=(), exclude_msgtypes=(), include_msgtypes=(),
        )  # fmt: skip
        messages, notes = read(target)
        assert len(messages) == COUNT and notes == []
        assert [m.data for m in messages] == [m.data for m in read(bag)[0]]


def test_a_damaged_database_is_read_up_to_the_damage(bag: Path, tmp_path: Path) -> None:
    target = tmp_path / "bag"
    target.mkdir()
    file = target / "bag_0.db3"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE topics(id, name, type, serialization_format)")
        database.execute("CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id, timestamp, data)")
        database.execute(f"INSERT INTO topics VALUES (1, '{JOINT_TOPIC}', 'x/msg/Y', 'cdr')")
        database.executemany(
            "INSERT INTO messages VALUES (?, 1, ?, ?)", [(k, k, bytes(2000)) for k in range(1, 400)]
        )
    database.close()
    data = bytearray(file.read_bytes())
    # page numbers of the table's inner page point to nowhere from its middle on
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    file.write_bytes(data)
    messages, notes = read(target)
    assert 50 < len(messages) < 399
    assert messages[0] == RawMessage(JOINT_TOPIC, "x/msg/Y", 1, bytes(2000))
    assert any("malformed" in note or "corrupt" in note for note in notes)


def test_a_path_without_a_bag_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert not is_bag(tmp_path)
    with pytest.raises(BagError, match=r"not a rosbag2: no metadata\.yaml, no \.mcap or \.db3"):
        Bag(tmp_path, Notes())
    (tmp_path / "empty.mcap").write_bytes(b"")
    messages, notes = read(tmp_path / "empty.mcap")
    assert messages == [] and "does not begin like an MCAP file" in notes[0]


def _small_chunks(bag: Path, target: Path) -> Path:
    """The same bag in chunks of about 20 messages."""
    from rosbags.rosbag2 import Reader, StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    types = get_typestore(Stores.ROS2_HUMBLE)
    with (
        Reader(bag) as reader,
        Writer(target, version=8, storage_plugin=StoragePlugin.MCAP) as writer,
    ):
        connections = {
            c.topic: writer.add_connection(c.topic, c.msgtype, typestore=types)
            for c in reader.connections
        }
        for k, (connection, stamp_ns, data) in enumerate(reader.messages()):
            writer.write(connections[connection.topic], stamp_ns, data)
            if k % 20 == 19:
                writer.storage.close_chunk()
    return target
