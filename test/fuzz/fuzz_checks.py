"""What all fuzz targets share: where their files go, and what they assert of every result."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data"
MAX_PIXELS = 1 << 18
MAX_MESSAGE_CHARS = 2100

Target = Callable[[bytes], None]

places: Path | None = None
"""Where the targets put their files; a fuzzer, which ends without a farewell, clears them there."""


def folder() -> Path:
    """A new folder until the process ends; below `places`, where that is set."""
    path = Path(tempfile.mkdtemp(prefix="fuzz_", dir=places))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def check_error(error: Exception) -> None:
    """It says something, and no more than a log can bear."""
    assert 0 < len(str(error)) <= MAX_MESSAGE_CHARS, f"{len(str(error))} characters"


def check_picture(picture: Any) -> None:
    assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8
    height, width, channels = picture.shape
    assert channels == 3 and 0 < height * width <= MAX_PIXELS
    assert picture.flags.c_contiguous
