"""Instruction and state → prompt text → tokens.

Sources: openpi `models/tokenizer.py` (PaligemmaTokenizer), LeRobot 0.6.1 `processor_pi05.py` and
`processor_pi0.py`. π0.5 reads its state from the text, as bin numbers.
"""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_ros.policy.processing import Convention
from pi05_ros.policy.weights import CheckpointError, read_regular_file, require_regular_file

TOKENIZER_FILE = "tokenizer.json"
REMEDY = (
    "put tokenizer.json and tokenizer_config.json there, for π0 and π0.5 those of "
    "google/paligemma-3b-pt-224"
)
# Limits of the file, its added tokens and its tokens; PaliGemma's has 34 MB, 7,600 and 262,144.
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_ADDED_TOKENS = 20_000
MAX_TOKENS = 600_000

BINS = 256
_EDGES = np.linspace(-1, 1, BINS + 1)[:-1]


def discretize(state: ArrayLike) -> NDArray[np.int64]:
    """Normalised state [dim] → bins [dim]: 0-255 over [-1, 1), -1 below, 255 from 1 on."""
    return np.digitize(np.asarray(state), _EDGES).astype(np.int64) - 1


def clean_instruction(instruction: str) -> str:
    """Apply openpi's rule: one line, no underscores, no outer spaces, case kept."""
    return instruction.strip().replace("_", " ").replace("\n", " ")


def pi05_prompt(instruction: str, state: ArrayLike) -> str:
    """π0.5's prompt; `state` [state_dim] is normalised and not padded."""
    bins = " ".join(str(value) for value in discretize(state))
    return f"Task: {clean_instruction(instruction)}, State: {bins};\nAction: "


def pi0_prompt(instruction: str, convention: Convention) -> str:
    """π0's prompt, which has no state. LeRobot's keeps the instruction as it is."""
    if convention == "openpi":
        return clean_instruction(instruction) + "\n"
    return instruction if instruction.endswith("\n") else instruction + "\n"


class PromptTooLongError(ValueError):
    """A prompt with a state that needs more tokens than the network takes."""

    def __init__(self, instruction: str, needed: int, available: int) -> None:
        shown = instruction if len(instruction) <= 60 else instruction[:60] + "…"
        super().__init__(
            f"the prompt needs {needed} tokens with the state, the network takes {available}: "
            f"shorten the instruction {shown!r} by {needed - available} tokens"
        )


@dataclass(frozen=True)
class Tokens:
    """One prompt as the network takes it."""

    ids: NDArray[np.int64]
    """[length], padded at the right."""
    mask: NDArray[np.bool_]
    """[length], False at the padding."""
    dropped: int = 0
    """Tokens cut off at the prompt's end, where π0.5's prompt has the state."""


class PromptTokenizer:
    """A checkpoint's tokenizer: text → BOS and tokens, padded to one length. Thread-safe."""

    def __init__(self, tokenizer: Any, length: int, vocab: int) -> None:
        """Wrap a transformers tokenizer; `vocab` is the network's number of embeddings."""
        if tokenizer.bos_token_id is None:
            raise CheckpointError("the tokenizer has no bos_token: it is not PaliGemma's kind")
        self._tokenizer = tokenizer
        self.bos = int(tokenizer.bos_token_id)
        self.eos = int(getattr(tokenizer, "eos_token_id", None) or 0)
        self._pad = int(tokenizer.pad_token_id or 0)
        self.length = length
        self.vocab = vocab
        # The tokenizer caches 10,000 words. A prompt without splits is one word and never recurs,
        # so the cache would grow to 31 MB of prompts.
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        resize_cache = getattr(model, "_resize_cache", None)
        if resize_cache is not None:
            resize_cache(0)
        # transformers sets truncation and padding on the shared Rust object in every call.
        self._lock = threading.Lock()

    @classmethod
    def from_directory(cls, directory: Path, length: int, vocab: int) -> PromptTokenizer:
        """Load the tokenizer from a checkpoint's folder; nothing is downloaded.

        Raises:
            CheckpointError: the files are missing or damaged.
        """
        if not (directory / TOKENIZER_FILE).is_file():
            raise CheckpointError(f"{directory} has no tokenizer: {REMEDY}")
        _check_files(directory)
        from transformers import AutoTokenizer  # takes seconds

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise bare Exceptions
            first_line = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"the tokenizer in {directory} cannot be loaded ({first_line}): {REMEDY}"
            ) from error
        return cls(tokenizer, length, vocab)

    def encode(self, text: str) -> Tokens:
        """BOS and the text's tokens, cut and padded to `length`.

        Raises:
            ValueError: a token without an embedding in the network.
        """
        ids = [self.bos, *self.token_ids(text)]
        if max(ids) >= self.vocab:
            raise ValueError(
                f"token {max(ids)} is outside the network's vocabulary of {self.vocab}: the "
                "tokenizer is another network's"
            )
        kept = ids[: self.length]
        padded = np.full(self.length, self._pad, dtype=np.int64)
        padded[: len(kept)] = kept
        return Tokens(padded, np.arange(self.length) < len(kept), len(ids) - len(kept))

    @functools.cached_property
    def widest_state(self) -> float:
        """The normalised value whose bin number takes the most tokens."""
        middles = (np.arange(-1, BINS) + 0.5) * 2 / BINS - 1
        # Twice each, as in a prompt: a number between blanks.
        counts = [len(self.token_ids(f" {n} {n}")) for n in discretize(middles)]
        return float(middles[int(np.argmax(counts))])

    def token_ids(self, text: str) -> list[int]:
        """The text's tokens alone."""
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Tokens) -> str:
        """The text of the tokens without the BOS and the padding."""
        ids = tokens.ids[tokens.mask][1:].tolist()
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _check_files(directory: Path) -> None:
    """Refuse files that block the loader or take it minutes.

    The loader opens every file, and loads an added token 20 times slower than a token of the
    vocabulary: 600,000 take half a minute.
    """
    for path in directory.iterdir():
        if not path.is_dir():
            require_regular_file(path, MAX_TOKENIZER_BYTES if path.suffix == ".json" else None)
    path = directory / TOKENIZER_FILE
    try:
        document = json.loads(read_regular_file(path, MAX_TOKENIZER_BYTES))
        added, tokens = len(document.get("added_tokens") or ()), len(document["model"]["vocab"])
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the loader reports it
    for what, count, limit in (
        ("added tokens", added, MAX_ADDED_TOKENS),
        ("tokens", tokens, MAX_TOKENS),
    ):
        if count > limit:
            raise CheckpointError(
                f"{path} has {count:,} {what}, and at most {limit:,} are loaded: take the "
                "tokenizer that the checkpoint was trained with"
            )
