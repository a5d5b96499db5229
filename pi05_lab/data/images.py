"""Pictures as PNG or JPEG, alone and in the row groups of parquet files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lab.data.lerobot_format import DatasetError
from pi05_ros.types import ImageArray

PNG_LEVEL = 1
"""Of 9. Level 6 makes simulated pictures 17 % smaller and takes 2.4 times as long."""


def encode(picture: ImageArray) -> bytes:
    """RGB [height, width, 3] → PNG."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])
    if not done:
        raise DatasetError(f"a picture of shape {picture.shape} could not be encoded")
    return bytes(data.tobytes())


def decode(data: bytes | memoryview) -> ImageArray:
    """PNG, JPEG, WebP, … → RGB [height, width, 3].

    Raises:
        DatasetError: this is no picture.
    """
    array = np.frombuffer(data, dtype=np.uint8)
    picture = cv2.imdecode(array, cv2.IMREAD_COLOR) if len(array) else None
    if picture is None:
        raise DatasetError(f"{len(array)} bytes are no picture that can be decoded")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), dtype=np.uint8)


class ParquetPictures:
    """The encoded pictures in the columns of several parquet files, by row.

    A row group's column is read when the first picture of it is asked for and stays until
    `cache_bytes` are exceeded. A picture that stands in several rows of a row group is kept once.

    Args:
        root: the dataset, to which paths of pictures outside the files are relative.
        files: the parquet files in the order of their rows.
        cache_bytes: of encoded pictures kept in memory.
    """

    def __init__(self, root: Path, files: Sequence[Path], cache_bytes: int) -> None:
        self._root = root
        self._files = list(files)
        self._cache_bytes = cache_bytes
        groups: list[tuple[int, int, int]] = []
        for number, file in enumerate(self._files):
            metadata = pq.read_metadata(file)
            groups += [
                (number, group, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
            ]
        self._groups = [(file, group) for file, group, _ in groups]
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        self._reset()

    def _reset(self) -> None:
        self._open: dict[tuple[int, str], pq.ParquetFile] = {}
        self._cache: OrderedDict[tuple[int, str], pa.StructArray] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Open files and the cache stay in their process."""
        own = ("_open", "_cache", "_used_bytes", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def encoded(self, key: str, row: int) -> bytes:
        """The picture of feature `key` in a row, as it was stored.

        Raises:
            DatasetError: the row group cannot be read or the picture is not there.
        """
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        cell = self._column(key, number)[row - int(self._starts[number])]
        data = cell["bytes"].as_py()
        if data is not None:
            return bytes(data)
        path = cell["path"].as_py() if "path" in cell else None
        if path and (self._root / path).is_file():
            return (self._root / path).read_bytes()
        raise DatasetError(f"row {row} of {key!r} has no picture (its path is {path!r})")

    def picture(self, key: str, row: int) -> ImageArray:
        """RGB [height, width, 3] of feature `key` in a row."""
        try:
            return decode(self.encoded(key, row))
        except DatasetError as error:
            raise DatasetError(f"{key}, row {row}: {error}") from None

    def _column(self, key: str, number: int) -> pa.StructArray:
        with self._lock:
            if (number, key) in self._cache:
                self._cache.move_to_end((number, key))
                return self._cache[number, key]
            file, group = self._groups[number]
            try:
                if (file, key) not in self._open:
                    self._open[file, key] = pq.ParquetFile(
                        self._files[file], read_dictionary=[f"{key}.bytes"], memory_map=True
                    )
                table = self._open[file, key].read_row_group(group, columns=[key])
            except (OSError, pa.ArrowException) as error:
                raise DatasetError(f"{self._files[file]} cannot be read: {error}") from None
            column = table.column(key).combine_chunks()
            self._cache[number, key] = column
            self._used_bytes += column.nbytes
            while self._used_bytes > self._cache_bytes and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._used_bytes -= old.nbytes
            return column
