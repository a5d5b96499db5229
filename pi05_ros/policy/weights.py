"""Tensors and JSON files of a checkpoint folder.

Sources: safetensors, Hugging Face's sharded index (`model.safetensors.index.json`), LeRobot's and
openpi's tensor names. The files are untrusted input: pickles, FIFOs and devices are refused, an
index cannot lead outside the folder, and no error message writes control characters to a terminal.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that a network's tensors may have in a file."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NAME_CHARS = 200
"""Limit for a shard's file name: file systems raise an error for longer names."""
MAX_ERROR_CHARS = 2000
MAX_JSON_BYTES = 32 * 2**20
"""Limit for a configuration or an index; the full network's index has 0.1 MB."""


def printable(text: str) -> str:
    """Text from a file for a terminal: one line, control and invisible characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class CheckpointError(ValueError):
    """An unusable checkpoint; the message names the file and the fault."""

    def __init__(self, text: str) -> None:
        text = printable(text)
        super().__init__(text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    name: str
    """In the file."""
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: F32, BF16, …"""


def require_directory(directory: str | Path) -> Path:
    """The folder as a Path.

    Raises:
        CheckpointError: it does not exist, or is a file.
    """
    path = Path(directory)
    if path.is_dir():
        return path
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such folder")
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(_pickle_message(path))
    raise CheckpointError(f"{path} is a file; give the folder that holds it and config.json")


def require_regular_file(path: Path, limit: int | None = None) -> None:
    """Raise CheckpointError for a FIFO or a device, which may block forever, and a large file.

    A missing file is left to the reader.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file: copy the checkpoint again")
    if limit is not None and found.st_size > limit:
        raise CheckpointError(
            f"{path} has {found.st_size / 2**20:.0f} MiB, and at most {limit >> 20} MiB are read: "
            "is it the right file?"
        )


def read_regular_file(path: Path, limit: int) -> bytes:
    """A file's bytes. Opening does not block, even if a FIFO replaces the file meanwhile.

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
        # Not only JSONDecodeError: invalid UTF-8, numbers of 5000 digits, 1000 nested levels.
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def find_weights(directory: Path) -> Path | None:
    """The folder's safetensors file or index; None for neither.

    Raises:
        CheckpointError: the folder has openpi's JAX layout; the message has the remedy.
    """
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    if (directory / "params").is_dir():
        raise CheckpointError(
            f"{directory} has openpi's JAX weights (params/), which are converted once: "
            f"python -m pi05_lab.data.openpi_jax {directory} OUTPUT"
        )
    return None


def tensor_index(directory: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's safetensors file or shards, by its name in the file.

    Raises:
        CheckpointError: no weights, pickle weights, a missing shard, or a damaged file.
    """
    path = require_directory(directory)
    found = find_weights(path)
    if found is not None:
        return _read_header(found) if found.name == SINGLE_FILE else _read_shards(found)
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_message(file))
    raise CheckpointError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor as stored, as a view of the mapped file.

    Its pages count as the process's memory until the view is deleted. One open file for all tensors
    would therefore hold the weights a second time.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(info.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(info.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{info.file} cannot be read: {error}") from None
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Allocates nothing of the tensor's size."""
    return not tensor.numel() or all(math.isfinite(value) for value in tensor.aminmax())


def kind_from_tensors(names: Collection[str]) -> str | None:
    """The kind by a tensor that it alone has; `pi0_fast` has PaliGemma's alone. Else None."""
    bare = {name.removeprefix("model.") for name in names}
    if "state_proj.weight" in bare:
        return "pi0"
    if "time_mlp_in.weight" in bare:
        return "pi05"
    only_language = all(name.startswith("paligemma_with_expert.paligemma.") for name in bare)
    return "pi0_fast" if bare and only_language else None


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is opened: "
        f"convert it to {SINGLE_FILE} on a machine that you trust it on"
    )


def _read_header(path: Path) -> dict[str, TensorInfo]:
    infos = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                infos[name] = TensorInfo(name, path, tuple(part.get_shape()), part.get_dtype())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: {error}; is it cut off? Copy it again"
        ) from None
    return infos


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    shards: dict[str, dict[str, TensorInfo]] = {}
    infos = {}
    for name, file_name in weight_map.items():
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
