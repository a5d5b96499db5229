"""Tensors of a safetensors file, copied block by block from the mapped file to where they belong.

A mapped page counts as the process's memory from its first use on. Each block's pages are given
back after the copy, so that loading needs the parameters and one block, on whatever device the
parameters lie. `safetensors.safe_open` keeps what it has touched until the file is closed, which
is the weights a second time.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pi05_ros.policy.weights import CheckpointError, TensorInfo

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
