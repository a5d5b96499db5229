"""openpi's messages; faults: a message that runs code, allocates gigabytes, or lies about sizes."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi05_ros.protocol import MAX_ENTRIES, ProtocolError, pack, text_keys, unpack

NUMBERS = st.sampled_from(["|b1", "|i1", "|u1", "<i2", "<u4", "<i8", "<f2", "<f4", "<f8", ">f4"])


@given(hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_every_array_comes_back_and_may_be_written(array: np.ndarray) -> None:
    found = unpack(pack({"a": array}))["a"]
    assert found.dtype == array.dtype and found.shape == array.shape
    np.testing.assert_array_equal(found, array)
    assert np.ndim(found) == 0 or found.flags.writeable


def test_an_array_has_openpis_marks() -> None:
    """Byte for byte what `openpi_client.msgpack_numpy` packs."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    marks = {
        b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": (2, 3)
    }  # fmt: skip
    assert pack(array) == msgpack.packb(marks)
    scalar = {b"__npgeneric__": True, b"data": 2.5, b"dtype": "<f4"}
    assert pack(np.float32(2.5)) == msgpack.packb(scalar)
    assert pack(array[:, ::2]) == pack(array[:, ::2].copy())


@pytest.mark.parametrize(
    "marks",
    [
        {"__ndarray__": True, "data": b"\x01\x02", "dtype": "|u1", "shape": [2]},
        {b"nd": True, b"type": b"|u1", b"kind": b"", b"shape": [2], b"data": b"\x01\x02"},
        {"nd": True, "type": "|u1", "kind": "", "shape": [2], "data": b"\x01\x02"},
    ],
)
def test_other_clients_marks_are_read(marks: dict[Any, Any]) -> None:
    np.testing.assert_array_equal(unpack(msgpack.packb(marks)), [1, 2])


def test_scalars_of_both_packages_are_read() -> None:
    assert unpack(msgpack.packb({b"nd": False, b"type": b"<f8", b"data": bytes(8)})) == 0.0
    found = unpack(pack({"n": np.int16(-3)}))["n"]
    assert found == -3 and found.dtype == np.int16


def array_of(**changes: Any) -> bytes:
    marks = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]}
    packed: bytes = msgpack.packb(marks | changes)
    return packed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array_of(dtype="|O"), "dtype must be a number's, not '|O'"),
        (array_of(dtype="<c8"), "must be a number's"),
        (array_of(dtype="<f16"), "must be a number's"),
        (array_of(dtype="i4,f4"), "dtype must"),
        (array_of(dtype=5), "dtype must not be 5"),
        (array_of(shape=[3]), "array \\[3\\] of float32 has 8 bytes"),
        (array_of(shape=[-2]), "shape must not be"),
        (array_of(shape=[2**40, 2**40]), "shape must not be"),
        (array_of(shape=[1] * 9), "shape must not be"),
        (array_of(shape=None), "shape must not be None"),
        (array_of(shape=[True, 2]), "shape must not be"),
        (array_of(data="text"), "has str of data"),
        (msgpack.packb({"__npgeneric__": True, "data": "x", "dtype": "<f4"}), "must be a number"),
        (msgpack.packb({"__npgeneric__": True, "data": 300, "dtype": "|u1"}), "does not fit"),
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x81" * 100_000, "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (msgpack.packb(list(range(MAX_ENTRIES + 1))), "not msgpack"),
        (pack({"a": 1}) + b"\x00", "not msgpack"),
    ],
)
def test_malformed_messages_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message.replace("|", "\\|")):
        unpack(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        unpack(data)
    except ProtocolError as error:
        assert "\n" not in str(error)


@given(st.binary(min_size=1, max_size=4), st.integers(0, 200))
def test_a_damaged_message_is_one_too(damage: bytes, place: int) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    data = bytearray(pack({"images": {"high": image}, "state": np.zeros(3), "prompt": "wave"}))
    place = min(place, len(data) - len(damage))
    data[place : place + len(damage)] = damage
    try:
        unpack(bytes(data))
    except ProtocolError as error:
        assert "\n" not in str(error)


def test_what_cannot_be_packed_is_named() -> None:
    for value, message in (
        (np.array([object()]), "NumPy type object"),
        (np.zeros(2, np.complex64), "NumPy type complex64"),
        ({1, 2}, "type set"),
        (2**70, "cannot be packed"),
    ):
        with pytest.raises(ProtocolError, match=message):
            pack(value)


def test_keys_become_text() -> None:
    assert text_keys({b"state": 1, "prompt": 2}) == {"state": 1, "prompt": 2}
    for wrong, message in (
        ([1], "must be a map, got list"),
        ({b"\xff": 1}, "UTF-8"),
        ({1: 2}, "1"),
    ):
        with pytest.raises(ProtocolError, match=message):
            text_keys(wrong)
