"""Digests of what a result depends on: an earlier result is reused only if they are equal."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path

import pi05_ros
from pi05_lab.evaluation.open_loop.jobs import names_function

_PACKAGES = ("numpy", "torch", "transformers", "opencv-python", "opencv-python-headless")
"""Libraries whose versions change results."""


def code_identity() -> str:
    """Of all Python files of these packages, and of the versions of the numeric libraries."""
    roots = (Path(pi05_ros.__file__).parent, Path(__file__).parents[2])
    return digest([text for root in roots for text in _sources(root)] + [*map(_version, _PACKAGES)])


def policy_identity(source: str) -> str:
    """Of a checkpoint's files or revision, or of the code of a "module:function".

    For a module, the Python files of its package count, or those beside a single file; other files
    that it reads are not seen. An identity that cannot be found is different every time.
    """
    if names_function(source):
        return _module_identity(source.partition(":")[0].partition(".")[0])
    from pi05_ros.policy.checkpoint import checkpoint_folder
    from pi05_ros.policy.weights import CheckpointError

    try:
        # A Hugging Face id resolves to the folder of one commit.
        folder = checkpoint_folder(source)
    except CheckpointError:
        return _unique()
    return digest([str(folder.resolve()), *map(repr, file_stamps(folder))])


def content(path: str | Path | None) -> str:
    """Of a small file's bytes; "" for none."""
    if path is None or not Path(path).is_file():
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def file_stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of a file, or of a folder's files."""
    if not path.exists():
        return []
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts."""
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()


def _module_identity(package: str) -> str:
    try:
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return _unique()
    if spec.submodule_search_locations:
        folders = map(Path, spec.submodule_search_locations)
        return digest(text for folder in folders for text in _sources(folder))
    file = Path(spec.origin or "")
    if not file.is_file():
        return _unique()
    alone = file.parent.name in ("site-packages", "dist-packages")
    return digest(map(content, [file] if alone else sorted(file.parent.glob("*.py"))))


def _sources(folder: Path) -> list[str]:
    return [f"{file.relative_to(folder)} {content(file)}" for file in sorted(folder.rglob("*.py"))]


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


def _unique() -> str:
    return f"unknown {uuid.uuid4()}"
