"""The tensors that a checkpoint folder holds: names, shapes and files, without reading the data.

Sources: the safetensors format (8-byte header length, JSON header), Hugging Face's sharded index
(`model.safetensors.index.json`), LeRobot's and openpi's tensor names.

Tensors of a safetensors file, copied block by block from the mapped file to where they belong.

A mapped page counts as the process's memory from its first use on. Each block's pages are given
back after the copy, so that loading needs the parameters and one block, on whatever device the
parameters lie. `safetensors.safe_open` keeps what it has touched until the file is closed, which
is the weights a second time.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class MappedFile:
    """One safetensors file; a context manager."""

    def __init__(self, path: Path) -> None:
        """Map the file, privately and read as it is used.

        Raises:
            CheckpointError: it cannot be opened.
        """
        try:
            with path.open("rb") as file:
                # A private map is writable, which torch asks of a buffer; nothing writes to it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._map.close()

    def copy_to(self, target: Tensor, info: TensorInfo) -> bool:
        """Copy a tensor into `target`, of the same count, contiguous, of any device and dtype.

        Returns:
            Whether all values are finite, in the target's dtype.
        """
        flat = target.view(-1)
        finite = True
        for first, values in self._blocks(info):
            block = flat[first : first + len(values)]
            block.copy_(values)
            finite = finite and _is_finite(block)
        return finite

    def is_finite(self, info: TensorInfo) -> bool:
        """Whether all values of a tensor are finite, as they are stored."""
        return all(_is_finite(values) for _, values in self._blocks(info))

    def _blocks(self, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
        """(Index of the first value, values), which may be used until the next block."""
        dtype = DTYPES[info.dtype]
        step = BLOCK_BYTES // dtype.itemsize
        for first in range(0, info.count, step):
            count = min(step, info.count - first)
            start = info.start + first * dtype.itemsize
            yield first, torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
            self._release(start, count * dtype.itemsize)

    def _release(self, start: int, length: int) -> None:
        if not hasattr(self._map, "madvise"):
            return
        page = mmap.PAGESIZE
        first = start // page * page
        self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)


def _is_finite(values: Tensor) -> bool:
    # Both are NaN where one value is. Nothing is allocated, unlike in torch.isfinite(values): what
    # 3000 such blocks leave of malloc's heap adds up to 0.4 GB.
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 200
"""Of a shard: longer names cannot be looked up on every file system."""
MAX_ERROR_CHARS = 2000
MAX_JSON_BYTES = 32 * 2**20
"""Of a configuration or an index; the full network's index has 0.1 MB."""
BYTES_EACH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The floating-point types of safetensors that a network may be stored in."""


def printable(text: str) -> str:
    """Text of a file for a terminal: one line, control and invisible characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""

    def __init__(self, text: str) -> None:
        text = printable(text)
        super().__init__(text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and what it is."""

    name: str
    """As it stands in the file."""
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, …"""
    start: int = 0
    """Its first byte in the file."""

    @property
    def count(self) -> int:
        """Its number of values."""
        return math.prod(self.shape)


def checkpoint_directory(directory: str | Path) -> Path:
    """The folder as a Path.

    Raises:
        CheckpointError: it is not there, or it is a file.
    """
    path = Path(directory)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_message(path))
        raise CheckpointError(f"{path} is a file; give the folder that holds it and config.json")
    raise CheckpointError(f"{path}: there is no such folder")


def require_regular_file(path: Path, limit: int | None = None) -> None:
    """Raise CheckpointError for a FIFO or a device, which may block for ever, and a large file.

    A missing file is left to the reader.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file: copy the checkpoint once more")
    if limit is not None and found.st_size > limit:
        raise CheckpointError(
            f"{path} has {found.st_size / 2**20:.0f} MiB, and at most {limit >> 20} MiB are read: "
            "is it the right file?"
        )


def read_regular_file(path: Path, limit: int) -> bytes:
    """A file's bytes. Opening does not block, whatever the path is.

    Raises:
        CheckpointError: not a regular file, or larger than `limit` bytes.
        OSError: missing or unreadable.
    """
    require_regular_file(path, limit)
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        return file.read(limit)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """One JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(read_regular_file(path, limit).decode("utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: no {path.name} in it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        # beside JSONDecodeError: bytes that are no text, numbers of 5000 digits, 1000 levels
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def tensor_index(directory: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's safetensors file or shards, by the name in the file.

    Raises:
        CheckpointError: no weights, pickle weights, a missing shard, or a damaged file.
    """
    path = checkpoint_directory(directory)
    if (path / SINGLE_FILE).is_file():
        return _read_header(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _read_shards(path / INDEX_FILE)
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(_pickle_message(pickles[0]))
    refuse_jax_weights(path)
    raise CheckpointError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def refuse_jax_weights(path: Path) -> None:
    """Raise CheckpointError with the remedy where the folder is openpi's JAX layout."""
    if (path / "params").is_dir():
        raise CheckpointError(
            f"{path} has openpi's JAX weights (params/), which are converted once: "
            f"python -m pi05_lab.data.openpi_jax {path} OUTPUT"
        )


def has_weights(directory: Path) -> bool:
    return (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()


def kind_from_tensors(names: set[str]) -> str | None:
    """`pi05` or `pi0`, by the tensors that only one of them has; None where neither is there."""
    bare = {name.removeprefix("model.") for name in names}
    if "state_proj.weight" in bare:
        return "pi0"
    if "time_mlp_in.weight" in bare:
        return "pi05"
    return None


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is opened: "
        f"convert it to {SINGLE_FILE} on a machine that you trust it on"
    )


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError("its header length does not fit the file; is it cut off?")
            header = json.loads(file.read(size))
            data_bytes = path.stat().st_size - 8 - size
        infos = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if len(shape) > MAX_DIMENSIONS or not all(map(_is_size, (start, end, *shape))):
                raise ValueError(f"tensor {name!r} has no valid shape and data_offsets")
            if end > data_bytes:
                raise ValueError(f"tensor {name!r} ends behind the end of the file; is it cut off?")
            info = TensorInfo(name, path, shape, str(entry["dtype"]), 8 + size + start)
            bytes_each = BYTES_EACH.get(info.dtype)
            if bytes_each and end - start != info.count * bytes_each:
                raise ValueError(f"tensor {name!r} has {end - start} bytes for shape {list(shape)}")
            infos[name] = info
        return infos
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    shards: dict[str, dict[str, TensorInfo]] = {}
    infos: dict[str, TensorInfo] = {}
    for name, file_name in weight_map.items():
        # An index is input: a shard is a plain safetensors name beside it, never a path elsewhere.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index}: {file_name!r} for {name!r} is not a file name")
        shard = index.parent / file_name
        if shard.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_message(shard))
        if len(file_name) > MAX_NAME_CHARS or not shard.is_file():
            raise CheckpointError(f"{index} names {file_name}, which is not in the folder")
        if file_name not in shards:
            shards[file_name] = _read_header(shard)
        if name not in shards[file_name]:
            raise CheckpointError(f"{index} places {name!r} in {file_name}, which does not hold it")
        infos[name] = shards[file_name][name]
    return infos
