"""Where a checkpoint lies: a folder, the small one of this package, or a Hugging Face id.

An id may pin a revision: `owner/name@revision`, where a commit hash is the one that cannot change.
What is in the cache is used without a connection. Pickles are never fetched.
"""

from __future__ import annotations

import re
from pathlib import Path

from pi05_ros.policy.small import SHIPPED, SMALL
from pi05_ros.policy.weights import CheckpointError

PATTERNS = ("*.json", "*.safetensors")
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def checkpoint_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint, fetched where it is a hub id that is not cached.

    Raises:
        CheckpointError: there is no such folder, and it is no id or cannot be had.
    """
    if str(path) == SMALL:
        if not (SHIPPED / "config.json").is_file():
            raise CheckpointError(
                f"{SHIPPED} is not there: the installation is not whole; repeat it"
            )
        return SHIPPED
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    match = HUB_ID.fullmatch(str(path))
    if match is None:
        raise CheckpointError(
            f"{path} is not a folder here, nor a Hugging Face id such as owner/name or "
            f'owner/name@revision; "{SMALL}" is the small network of this package'
        )
    repo, revision = match["repo"], match["revision"]
    if revision and COMMIT.fullmatch(revision):
        # A commit cannot change, so the cached one needs no question to the hub.
        cached = _snapshot(repo, revision, PATTERNS, local=True)
        if isinstance(cached, Path) and (cached / "config.json").is_file():
            return cached
    found = _snapshot(repo, revision, PATTERNS, local=False)
    if isinstance(found, Path):
        return found
    raise CheckpointError(
        f"{path} is not a folder here, and as a Hugging Face id it is neither cached nor can it be "
        f"fetched ({found}). Check its spelling and the connection, log in where it is gated, or "
        f"fetch it on another machine and give its folder"
    )


def cached_tokenizer(name: str) -> Path | None:
    """The cached snapshot of a hub repository with its tokenizer.json; nothing is downloaded."""
    if HUB_ID.fullmatch(name) is None:
        return None
    found = _snapshot(name, None, TOKENIZER_PATTERNS, local=True)
    if isinstance(found, Path) and (found / "tokenizer.json").is_file():
        return found
    return None


def _snapshot(
    repo: str, revision: str | None, patterns: tuple[str, ...], local: bool
) -> Path | str:
    """The snapshot's folder, or why there is none."""
    # a second of import, of use to nobody who has a folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), local_files_only=local
            )
        )
    except Exception as error:  # the hub's own, those of its HTTP client, OSError
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
