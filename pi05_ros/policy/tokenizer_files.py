"""The tokenizer's files are looked at before the library that loads them.

It follows any path that opens, and takes a token added to the vocabulary 20 times as long as one
that is part of it: 600,000 of them take half a minute.
"""

from __future__ import annotations

import json
from pathlib import Path

from pi05_ros.policy.weights import CheckpointError, read_regular_file, require_regular_file

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 * 2**20
"""PaliGemma's has 34 MB."""
MAX_ADDED_TOKENS = 20_000
"""Gemma's have 6,400, PaliGemma's some 1,200 more."""
MAX_TOKENS = 600_000
"""Gemma's have 262,144."""


def check_tokenizer_files(directory: Path) -> None:
    """Raise CheckpointError for what would block the loader or take it very long.

    Args:
        directory: a checkpoint with tokenizer.json.
    """
    for path in sorted(directory.iterdir()):
        if not path.is_dir():
            require_regular_file(path, MAX_TOKENIZER_BYTES if path.suffix == ".json" else None)
    path = directory / TOKENIZER_FILE
    try:
        document = json.loads(read_regular_file(path, MAX_TOKENIZER_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        return  # the loader says what is wrong
    if not isinstance(document, dict):
        return
    model = document.get("model")
    counts = {
        "added tokens": (_length(document.get("added_tokens")), MAX_ADDED_TOKENS),
        "tokens": (_length(model.get("vocab")) if isinstance(model, dict) else 0, MAX_TOKENS),
    }
    for what, (count, limit) in counts.items():
        if count > limit:
            raise CheckpointError(
                f"{path} has {count:,} {what}, and at most {limit:,} are loaded: take the "
                "tokenizer that the checkpoint was trained with"
            )


def _length(value: object) -> int:
    return len(value) if isinstance(value, (list, dict)) else 0
