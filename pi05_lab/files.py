"""Files and folders that appear only when they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to; it replaces `path` at the end, and is removed after an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder to fill; it becomes `path` at the end, and is removed after an exception.

    With `resume` the folder of an unfinished call is used, and stays after an exception.

    Raises:
        FileExistsError: `path` exists and is not to be replaced.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"output folder exists: {path}. Remove it or name another one")
    partial = partial_folder(path)
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=resume)
    try:
        yield partial
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Where a folder is filled before it becomes `path`."""
    return path.with_name(path.name + PARTIAL)
