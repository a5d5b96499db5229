"""The parquet tables of a data set: frames, episodes, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi05_lab.data import lerobot_format as layout
from pi05_lab.data.lerobot_format import DatasetError, Features

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# An image that many rows share is written once if its column's dictionary has room for all images
# of a row group.
_DICTIONARY_BYTES = 1 << 28

ROWS_PER_GROUP = 256
"""The least rows of a row group; short episodes share one."""


def data_schema(features: Features) -> pa.Schema:
    """The columns of the data files. Videos have none."""
    fields = []
    for key, feature in features.as_info().items():
        if feature["dtype"] == "image":
            fields.append(pa.field(key, _IMAGE))
        elif feature["dtype"] != "video":
            # One number for [1], a list of fixed length for a vector, lists of lists for arrays.
            kind, shape = pa.from_numpy_dtype(np.dtype(feature["dtype"])), feature["shape"]
            if shape != [1]:
                kind = pa.list_(kind, shape[0] if len(shape) == 1 else -1)
                for _ in shape[1:]:
                    kind = pa.list_(kind)
            fields.append(pa.field(key, kind))
    return pa.schema(fields)


def data_table(
    schema: pa.Schema, columns: Mapping[str, NDArray[Any]], images: Mapping[str, Sequence[Any]]
) -> pa.Table:
    """The rows of one episode, of columns [n, …] by feature key and images by camera."""
    arrays = []
    for field in schema:
        if field.type == _IMAGE:
            encoded = pa.array(images[layout.camera_name(field.name)], pa.binary())
            paths = pa.nulls(len(encoded), pa.string())
            arrays.append(pa.StructArray.from_arrays([encoded, paths], fields=list(_IMAGE)))
            continue
        values = columns[field.name]
        array = pa.array(np.ascontiguousarray(values).ravel())
        if pa.types.is_fixed_size_list(field.type):
            array = pa.FixedSizeListArray.from_arrays(array, type=field.type)
        elif pa.types.is_list(field.type):
            for axis in range(values.ndim - 1, 0, -1):
                count = int(np.prod(values.shape[:axis]))
                offsets = np.arange(count + 1, dtype=np.int32) * values.shape[axis]
                array = pa.ListArray.from_arrays(pa.array(offsets), array)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


class DataFiles:
    """Writes episodes into data files of limited size."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self.place = (0, 0)
        """Chunk and file that are written to."""
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self.paths: list[Path] = []
        """The files in the order of their rows."""

    def append(self, table: pa.Table) -> tuple[int, int]:
        """Add an episode's rows; the chunk and file that they are written to."""
        written = 0 if self._writer is None else self._writer.file_handle.tell()
        size = written + sum(part.nbytes for part in self._pending)
        if size and size + table.nbytes > layout.DATA_FILE_MB << 20:
            self.end_file()
        self._pending.append(table)
        if sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self.flush()
        return self.place

    def end_file(self) -> None:
        """Write everything; later rows go to the next file."""
        self.flush()
        self.close()
        self.place = layout.next_file(*self.place)

    def flush(self) -> None:
        """Write the pending rows as one row group."""
        if not self._pending:
            return
        if self._writer is None:
            chunk, file = self.place
            path = self._folder / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.paths.append(path)
            # Encoded images do not compress further.
            images = [f"{field.name}.bytes" for field in self._schema if field.type == _IMAGE]
            # An empty file has the paths of all its columns; a struct has several.
            empty = pa.BufferOutputStream()
            pq.write_table(self._schema.empty_table(), empty)
            columns = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
            paths = [columns.column(k).path for k in range(len(columns))]
            codecs = dict.fromkeys(paths, "zstd") | dict.fromkeys(images, "none")
            self._writer = pq.ParquetWriter(
                path,
                self._schema,
                compression=codecs,
                use_dictionary=images,
                dictionary_pagesize_limit=_DICTIONARY_BYTES,
                write_statistics=[f.name for f in self._schema if pa.types.is_integer(f.type)],
            )
        rows = pa.concat_tables(self._pending)
        self._writer.write_table(rows, row_group_size=len(rows))
        self._pending = []

    def close(self) -> None:
        """Close the current file, without pending rows."""
        self._pending = []
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_column(files: Sequence[Path], key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """[n, *shape] of one feature over several data files; [n] for the shape [1].

    DatasetError if a file cannot be read, lacks the column, or a row has another shape.
    """
    parts: list[NDArray[Any]] = []
    for file in files:
        try:
            column: Any = pq.read_table(file, columns=[key], partitioning=None).column(0)
        except (OSError, IndexError, pa.ArrowException) as error:
            raise DatasetError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
        for array in column.chunks:
            rows, missing = len(array), array.null_count
            while isinstance(array, pa.ExtensionArray):
                array = array.storage
            while pa.types.is_nested(array.type) and hasattr(array, "flatten"):
                array = array.flatten()
                missing += array.null_count
            if missing:
                raise DatasetError(f"{file}: {key!r} has {missing} missing values")
            values = np.asarray(array.to_numpy(zero_copy_only=False))
            if len(values) != rows * int(np.prod(shape)):
                raise DatasetError(
                    f"{file}: {key!r} does not have shape {list(shape)} in every row"
                )
            parts.append(values if tuple(shape) == (1,) else values.reshape(rows, *shape))
    return np.concatenate(parts) if parts else np.empty((0, *shape))


def write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """tasks.parquet as pandas writes it: the instruction is the table's index."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy,
         "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]  # fmt: skip
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "creator": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def write_episodes(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of episodes, one row each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    columns["meta/episodes/chunk_index"] = columns["meta/episodes/file_index"] = [0] * len(rows)
    pq.write_table(pa.table(columns), path)
