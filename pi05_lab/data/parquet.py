"""The parquet tables of a dataset: frames, episodes, tasks."""

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
from pi05_lab.data.lerobot_format import DatasetError, Features, Statistics

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# A picture that stands in many rows is written once if its column's dictionary has room for all
# pictures of a row group.
_DICTIONARY_BYTES = 1 << 28

ROWS_PER_GROUP = 256
"""At least so many rows stand in one row group; short episodes share one."""


def data_schema(features: Features) -> pa.Schema:
    """The columns of the data files. Videos have none."""
    fields = []
    for key, feature in features.as_info().items():
        if feature["dtype"] == "image":
            fields.append(pa.field(key, _PICTURE))
        elif feature["dtype"] != "video":
            value = pa.from_numpy_dtype(np.dtype(feature["dtype"]))
            fields.append(pa.field(key, _nested(value, tuple(feature["shape"]))))
    return pa.schema(fields)


def _nested(value: pa.DataType, shape: tuple[int, ...]) -> pa.DataType:
    """One number for [1], a list of fixed length for a vector, lists of lists for arrays."""
    if shape == (1,):
        return value
    if len(shape) == 1:
        return pa.list_(value, shape[0])
    for _ in shape:
        value = pa.list_(value)
    return value


def data_table(
    schema: pa.Schema,
    columns: Mapping[str, NDArray[Any]],
    pictures: Mapping[str, Sequence[Any]],
) -> pa.Table:
    """The rows of one episode.

    Args:
        schema: of the file.
        columns: feature key → [n, …].
        pictures: camera → n encoded pictures.
    """
    arrays = []
    for field in schema:
        if field.type == _PICTURE:
            encoded = pa.array(pictures[layout.camera_name(field.name)], pa.binary())
            paths = pa.nulls(len(encoded), pa.string())
            arrays.append(pa.StructArray.from_arrays([encoded, paths], fields=list(_PICTURE)))
        else:
            arrays.append(_nested_array(columns[field.name], field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _nested_array(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).ravel())
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    if not pa.types.is_list(kind):
        return flat
    for axis in range(values.ndim - 1, 0, -1):
        count = int(np.prod(values.shape[:axis]))
        offsets = np.arange(count + 1, dtype=np.int32) * values.shape[axis]
        flat = pa.ListArray.from_arrays(pa.array(offsets), flat)
    return flat


class DataFiles:
    """Writes episodes into data files of limited size.

    Args:
        folder: the dataset's.
        schema: of every file.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self._place = (0, 0)
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self.paths: list[Path] = []
        """The files in the order of their rows."""

    def append(self, table: pa.Table) -> tuple[int, int]:
        """Take an episode's rows; the chunk and file that they will stand in."""
        written = 0 if self._writer is None else self._writer.file_handle.tell()
        size = written + sum(part.nbytes for part in self._pending)
        if size and size + table.nbytes > layout.DATA_FILE_MB << 20:
            self.close()
            self._place = layout.next_file(*self._place)
        self._pending.append(table)
        if sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self._flush()
        return self._place

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self._writer = self._open()
        rows = pa.concat_tables(self._pending)
        self._writer.write_table(rows, row_group_size=len(rows))
        self._pending = []

    def _open(self) -> pq.ParquetWriter:
        chunk, file = self._place
        path = self._folder / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.paths.append(path)
        pictures = [field.name for field in self._schema if field.type == _PICTURE]
        return pq.ParquetWriter(
            path,
            self._schema,
            # encoded pictures don't get smaller
            compression={
                leaf: "none" if leaf.removesuffix(".bytes") in pictures else "zstd"
                for leaf in _leaves(self._schema)
            },
            use_dictionary=[f"{name}.bytes" for name in pictures],
            dictionary_pagesize_limit=_DICTIONARY_BYTES,
            write_statistics=[f.name for f in self._schema if pa.types.is_integer(f.type)],
        )

    def close(self) -> None:
        """Finish the file that is being written."""
        self._flush()
        self.abandon()

    def abandon(self) -> None:
        """Close the file that is being written, without the rows that still wait."""
        self._pending = []
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of the parquet columns, which a nested column has several of."""
    paths = []
    for field in schema:
        name, kind = field.name, field.type
        if kind == _PICTURE:
            paths += [f"{name}.bytes", f"{name}.path"]
            continue
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        paths.append(name)
    return paths


def read_column(files: Sequence[Path], key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """[n, *shape] of one feature over several data files; [n] for the shape [1].

    Raises:
        DatasetError: a file cannot be read, lacks the column, or a row has another shape.
    """
    parts = []
    for file in files:
        try:
            column: Any = pq.read_table(file, columns=[key], partitioning=None).column(0)
        except (OSError, IndexError, pa.ArrowException) as error:
            raise DatasetError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
        for array in column.chunks:
            parts.append(_as_numpy(array, key, shape, file))
    return np.concatenate(parts) if parts else np.empty((0, *shape))


def _as_numpy(array: Any, key: str, shape: tuple[int, ...], file: Path) -> NDArray[Any]:
    rows = len(array)
    missing = array.null_count
    while isinstance(array, pa.ExtensionArray):
        array = array.storage
    while pa.types.is_nested(array.type) and hasattr(array, "flatten"):
        array = array.flatten()
        missing += array.null_count
    if missing:
        raise DatasetError(f"{file}: {key!r} has {missing} missing values")
    values = np.asarray(array.to_numpy(zero_copy_only=False))
    expected = rows * int(np.prod(shape))
    if len(values) != expected:
        raise DatasetError(f"{file}: {key!r} does not have shape {list(shape)} in every row")
    return values if tuple(shape) == (1,) else values.reshape(rows, *shape)


def write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """tasks.parquet as pandas writes it: the instruction is the table's index."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    columns = [
        {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": numpy,
            "metadata": None,
        }
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "creator": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def write_episodes(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of episodes, one row each."""
    place = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pq.write_table(pa.table(columns | {name: [k] * len(rows) for name, k in place.items()}), path)


def flat_statistics(statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    """`stats/<feature>/<name>` → lists, as the table of episodes has them."""
    return {
        f"stats/{key}/{name}": value.tolist()
        for key, found in statistics.items()
        for name, value in found.items()
    }


def nested_lists(statistics: Mapping[str, Statistics]) -> dict[str, dict[str, Any]]:
    """Feature → name → lists, as stats.json has them."""
    return {
        key: {name: value.tolist() for name, value in found.items()}
        for key, found in statistics.items()
    }
