"""openpi's messages: msgpack with NumPy arrays, and nothing that could run code.

An array is a map with `__ndarray__`, `data` (C order), `dtype` (NumPy's `dtype.str`) and `shape`; a
scalar has `__npgeneric__`. Keys are bytes from openpi's client and text from others. The older
marks of the package msgpack-numpy (`nd`, `type`, `kind`) are read too.

Sources: openpi `packages/openpi-client/src/openpi_client/msgpack_numpy.py`; msgpack-numpy 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

MAX_ENTRIES = 4096
"""Of a map or a list; an observation has tens."""
MAX_DIMENSIONS = 8
KINDS = "biuf"
"""NumPy's kinds of numbers that a message may have: bool, signed, unsigned, float."""


class ProtocolError(ValueError):
    """A message that is not openpi's; one line says what is wrong with it."""


def pack(message: Any) -> bytes:
    """A message of maps, lists, text, numbers, bytes, arrays and NumPy's scalars.

    Raises:
        ProtocolError: another type, or an array of objects, records or complex numbers.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"a message cannot be packed: {error}") from None
    return packed


def unpack(data: bytes) -> Any:
    """The message; its arrays are copies that may be written.

    Raises:
        ProtocolError: no msgpack, or an array whose type, shape and data do not fit together.
    """
    try:
        return msgpack.unpackb(
            data,
            object_hook=_decode,
            strict_map_key=False,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
        )
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises many kinds, RecursionError among them
        raise ProtocolError(f"a message is not msgpack: {_line(error)}") from None


def text_keys(message: Any) -> dict[str, Any]:
    """A map with its keys as text.

    Raises:
        ProtocolError: no map, or a key that is neither text nor UTF-8.
    """
    if not isinstance(message, Mapping):
        raise ProtocolError(f"a message must be a map, got {type(message).__name__}")
    found = {}
    for key, value in message.items():
        if isinstance(key, bytes):
            try:
                key = key.decode()
            except UnicodeDecodeError:
                raise ProtocolError(f"key {key[:40]!r} is not UTF-8") from None
        if not isinstance(key, str):
            raise ProtocolError(f"key {key!r:.40} is not text")
        found[key] = value
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in KINDS:
        raise TypeError(f"NumPy type {value.dtype}")
    if isinstance(value, np.ndarray):
        # openpi's client wants bytes as keys
        return {
            b"__ndarray__": True,
            b"data": np.ascontiguousarray(value).tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"type {type(value).__name__}")


def _decode(document: dict[Any, Any]) -> Any:
    for array, scalar, kind in (
        (b"__ndarray__", b"__npgeneric__", b"dtype"),
        ("__ndarray__", "__npgeneric__", "dtype"),
        (b"nd", b"nd", b"type"),
        ("nd", "nd", "type"),
    ):
        if array in document or scalar in document:
            text = isinstance(kind, str)
            data = document.get("data" if text else b"data")
            dtype = _dtype(document.get(kind))
            # msgpack-numpy has one mark for both, true for arrays
            if document.get(array) is True:
                return _array(data, dtype, document.get("shape" if text else b"shape"))
            return _scalar(data, dtype)
    return document


def _dtype(name: Any) -> np.dtype[Any]:
    name = name.decode("latin-1") if isinstance(name, bytes) else name
    if not isinstance(name, str) or len(name) > 8:
        raise ProtocolError(f"an array's dtype must not be {name!r:.40}")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError):
        raise ProtocolError(f"an array's dtype must not be {name!r}") from None
    if dtype.kind not in KINDS or dtype.itemsize > 8:
        raise ProtocolError(f"an array's dtype must be a number's, not {name!r}")
    return dtype


def _array(data: Any, dtype: np.dtype[Any], shape: Any) -> Any:
    sizes = list(shape) if isinstance(shape, (list, tuple)) else None
    if sizes is None or len(sizes) > MAX_DIMENSIONS or not all(map(_is_size, sizes)):
        raise ProtocolError(f"an array's shape must not be {shape!r:.80}")
    if not isinstance(data, bytes) or math.prod(sizes) * dtype.itemsize != len(data):
        given = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise ProtocolError(f"an array {sizes} of {dtype} has {given} of data")
    return np.frombuffer(data, dtype).reshape(sizes).copy()


def _scalar(data: Any, dtype: np.dtype[Any]) -> Any:
    if isinstance(data, bytes):
        # msgpack-numpy's scalars are bytes
        return _array(data, dtype, ())[()]
    if not isinstance(data, (bool, int, float)):
        raise ProtocolError(f"a NumPy scalar must be a number, not {type(data).__name__}")
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise ProtocolError(f"a NumPy scalar does not fit {dtype}: {error}") from None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**31


def _line(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip().splitlines()[0][:200]
