"""What a result depends on beside the recording and the settings: code, checkpoints, files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pi05_ros

_PACKAGES = ("numpy", "torch", "transformers", "opencv-python", "opencv-python-headless")


def code_identity() -> str:
    """Changes with any Python file of this package, and with the libraries that compute."""
    return _digest([*_sources(Path(pi05_ros.__file__).parent), *map(_version, _PACKAGES)])


def policy_identity(source: str) -> str:
    """Changes with a checkpoint's files or revision, or with the code of a "module:function".

    Of a module, the Python files of its package count, or those beside a single file; what it reads
    otherwise is not seen. What cannot be established is different every time.
    """
    module, colon, _ = source.partition(":")
    if colon and not source.startswith(("/", ".")):
        return _module_identity(module)
    from pi05_ros.policy.checkpoint import checkpoint_folder
    from pi05_ros.policy.weights import CheckpointError

    try:
        # a Hugging Face id is resolved to the folder of one commit
        folder = checkpoint_folder(source)
    except CheckpointError:
        return _never()
    return _digest([str(folder.resolve()), *map(repr, file_stamps(folder))])


def content(path: str | Path | None) -> str:
    """A small file's bytes as a digest; "" for none."""
    if path is None or not Path(path).is_file():
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def file_stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of a folder's files."""
    if not path.exists():
        return []
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _module_identity(module: str) -> str:
    try:
        spec: Any = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return _never()
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if folders:
        return _digest(text for folder in folders for text in _sources(folder))
    if spec.origin is None or not Path(spec.origin).is_file():
        return _never()
    file = Path(spec.origin)
    alone = file.parent.name in ("site-packages", "dist-packages")
    return _digest([content(file)] if alone else map(content, sorted(file.parent.glob("*.py"))))


def _sources(folder: Path) -> list[str]:
    return [f"{file.relative_to(folder)} {content(file)}" for file in sorted(folder.rglob("*.py"))]


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _never() -> str:
    return f"unknown {uuid.uuid4()}"
