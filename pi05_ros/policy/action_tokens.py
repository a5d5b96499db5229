"""FAST: chunks of actions as tokens, by a cosine transform and byte-pair encoding.

Source: π0-FAST (arXiv 2501.09747) and the processor `physical-intelligence/fast`, whose folders are
read and written. A chunk [horizon, dim] of normalised actions becomes

1. an orthonormal DCT-II over time, of each dimension by itself;
2. `round(coefficient · scale)`, half to even: the symbols;
3. one text with all dimensions of the lowest frequency first, a character `symbol - min_symbol`
   for each symbol;
4. the tokens of that text by byte-pair encoding.

The reference drops symbols outside its alphabet and decodes what does not fit to zeros. Here they
are clipped into the alphabet, and counted; an answer that is cut short keeps the low frequencies
that it has; one that cannot be read is an error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_ros.policy.weights import CheckpointError, read_json, require_regular_file

PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
REFERENCE_CODE = "physical-intelligence/fast--processing_action_tokenizer.UniversalActionProcessor"
"""Where transformers finds the code of the processor."""
MAX_FILE_BYTES = 2**26
SURROGATES = range(0xD800, 0xE000)
"""Code points that no text has."""

FloatArray = NDArray[np.float64]


class ActionTokenError(ValueError):
    """Tokens that are no chunk, or a chunk that cannot be tokenised."""


@dataclass(frozen=True)
class Encoded:
    """A chunk's tokens."""

    ids: list[int]
    clipped: int
    """Symbols that were outside the alphabet."""


@dataclass(frozen=True)
class Decoded:
    """A chunk from tokens."""

    actions: FloatArray
    """[horizon, dim]"""
    missing: int
    """Symbols that an answer cut short lacks: the highest frequencies, taken as 0."""


@functools.cache
def _cosines(horizon: int) -> FloatArray:
    """[horizon, horizon] the orthonormal DCT-II: coefficients = matrix @ values."""
    steps = np.arange(horizon)
    matrix = np.sqrt(2 / horizon) * np.cos(
        np.pi * (2 * steps[None] + 1) * steps[:, None] / (2 * horizon)
    )
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix)


def _symbols(chunks: ArrayLike, scale: float) -> NDArray[np.int64]:
    """[n, horizon, dim] → the same shape; ActionTokenError for values that are not finite.

    With scipy, because the reference rounds its float32: another order of the same sum meets
    another side of a half in one of a million coefficients.
    """
    try:
        from scipy.fft import dct
    except ImportError:
        raise ActionTokenError(
            "tokenising actions needs scipy: pip install 'pi05_ros[train]'"
        ) from None
    values = np.asarray(chunks)
    if values.ndim != 3 or 0 in values.shape:
        raise ActionTokenError(f"chunks must be [n, horizon, dim], not {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ActionTokenError("a chunk has values that are not finite")
    return np.asarray(np.around(dct(values, axis=1, norm="ortho") * scale)).astype(np.int64)


class ActionTokenizer:
    """Encodes and decodes chunks.

    Args:
        bpe: the byte-pair encoding, a `tokenizers.Tokenizer` over characters.
        scale: coefficients are multiplied by it and rounded.
        min_symbol: the symbol of the character 0, `min_token` in the reference's files.
        horizon: steps of a chunk; None: every call says it.
        action_dim: values of a step; None likewise.

    Raises:
        CheckpointError: the encoding has no alphabet.
    """

    def __init__(
        self,
        bpe: Any,
        scale: float,
        min_symbol: int,
        horizon: int | None = None,
        action_dim: int | None = None,
    ) -> None:
        self.scale, self.min_symbol = scale, min_symbol
        self.horizon, self.action_dim = horizon, action_dim
        self._bpe = bpe
        self.vocab_size = int(bpe.get_vocab_size())
        self._alphabet = _alphabet(bpe)
        if not len(self._alphabet):
            raise CheckpointError("the action tokenizer has no alphabet")

    @classmethod
    def fit(cls, chunks: ArrayLike, scale: float = 10.0, vocab_size: int = 1024) -> ActionTokenizer:
        """Learn the alphabet and the merges from chunks [n, horizon, dim].

        Raises:
            ActionTokenError: values that are not finite, or more symbols than `vocab_size`: lower
                the scale or give more entries.
        """
        from tokenizers import ByteLevelBPETokenizer
        from tokenizers.trainers import BpeTrainer

        symbols = _symbols(chunks, scale)
        low, high = int(symbols.min()), int(symbols.max())
        if high - low >= vocab_size:
            raise ActionTokenError(
                f"{high - low + 1} symbols do not fit {vocab_size} tokens: lower the scale or give "
                "a larger vocabulary"
            )
        bpe = ByteLevelBPETokenizer()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(code) for code in range(high - low + 1)],
            max_token_length=10_000,
        )
        texts = (_text(chunk.ravel() - low) for chunk in symbols)
        bpe._tokenizer.train_from_iterator(texts, trainer=trainer)
        _, horizon, dim = symbols.shape
        return cls(bpe._tokenizer, scale, low, horizon, dim)

    @classmethod
    def load(cls, folder: str | Path) -> ActionTokenizer:
        """Read a folder of `physical-intelligence/fast`'s format; no code of it is run.

        Raises:
            CheckpointError: missing or damaged files.
        """
        from tokenizers import Tokenizer

        path = Path(folder)
        document = read_json(path / PROCESSOR_FILE)
        file = path / TOKENIZER_FILE
        require_regular_file(file, MAX_FILE_BYTES)
        try:
            bpe = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        scale, low = document.get("scale"), document.get("min_token")
        horizon, dim = document.get("time_horizon"), document.get("action_dim")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e6:
            raise CheckpointError(f"{path / PROCESSOR_FILE}: scale must not be {scale!r}")
        if isinstance(low, bool) or not isinstance(low, int):
            raise CheckpointError(f"{path / PROCESSOR_FILE}: min_token must not be {low!r}")
        for key, value in (("time_horizon", horizon), ("action_dim", dim)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if value is not None and not whole:
                raise CheckpointError(f"{path / PROCESSOR_FILE}: {key} must not be {value!r}")
        return cls(bpe, float(scale), low, horizon, dim)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` and transformers' AutoProcessor read; it is made if need be.

        transformers takes the processor's code from the Hub, with `trust_remote_code=True`.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._bpe.save(str(path / TOKENIZER_FILE))
        scale = int(self.scale) if self.scale == int(self.scale) else self.scale
        processor = {
            "action_dim": self.action_dim,
            "auto_map": {"AutoProcessor": REFERENCE_CODE},
            "min_token": self.min_symbol,
            "processor_class": "UniversalActionProcessor",
            "scale": scale,
            "time_horizon": self.horizon,
            "vocab_size": self.vocab_size,
        }
        tokenizer = {
            "added_tokens_decoder": {},
            "auto_map": {"AutoProcessor": REFERENCE_CODE},
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
            "processor_class": "UniversalActionProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        for name, document in ((PROCESSOR_FILE, processor), (TOKENIZER_CONFIG, tokenizer)):
            text = json.dumps(document, indent=2) + "\n"
            (path / name).write_text(text, encoding="utf-8")
        (path / "special_tokens_map.json").write_text("{}\n", encoding="utf-8")

    def encode(self, chunk: ArrayLike) -> Encoded:
        """Normalised actions [horizon, dim] → tokens.

        Raises:
            ActionTokenError: another shape, or values that are not finite.
        """
        values = np.asarray(chunk)
        if values.ndim != 2:
            raise ActionTokenError(f"a chunk must be [horizon, dim], not {list(values.shape)}")
        codes = _symbols(values[None], self.scale).ravel() - self.min_symbol
        place = np.clip(np.searchsorted(self._alphabet, codes), 0, len(self._alphabet) - 1)
        before = np.maximum(place - 1, 0)
        near, far = self._alphabet[before], self._alphabet[place]
        nearest = np.where(np.abs(near - codes) <= np.abs(far - codes), near, far)
        nearest = np.where(far == codes, far, nearest)
        ids = self._bpe.encode(_text(nearest), add_special_tokens=False).ids
        return Encoded(list(ids), int((nearest != codes).sum()))

    def decode(
        self, ids: Sequence[int], horizon: int | None = None, action_dim: int | None = None
    ) -> Decoded:
        """Tokens → actions [horizon, dim]; both default to those of the tokenizer.

        Raises:
            ActionTokenError: no tokens, an unknown one, or more symbols than the chunk has.
        """
        horizon, dim = horizon or self.horizon, action_dim or self.action_dim
        if horizon is None or dim is None:
            raise ActionTokenError("this action tokenizer has no horizon and action_dim: give them")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ActionTokenError(f"token {token} is not one of the {self.vocab_size}")
        # a character of several bytes may be cut in two
        text = self._bpe.decode(list(ids), skip_special_tokens=False).rstrip("\ufffd")
        codes = np.array([ord(character) for character in text], dtype=np.int64)
        count = horizon * dim
        if not len(codes):
            raise ActionTokenError("no tokens: there is no chunk")
        if len(codes) > count:
            raise ActionTokenError(
                f"{len(codes)} symbols, a chunk of {horizon} steps and {dim} values has {count}"
            )
        unknown = codes[~np.isin(codes, self._alphabet)]
        if len(unknown):
            raise ActionTokenError(
                f"the tokens hold a symbol {unknown[0]} that is not in the alphabet"
            )
        symbols = np.zeros(count)
        symbols[: len(codes)] = codes + self.min_symbol
        coefficients = symbols.reshape(horizon, dim) / self.scale
        return Decoded(_cosines(horizon).T @ coefficients, count - len(codes))


def _text(codes: NDArray[np.int64]) -> str:
    return "".join(map(chr, codes.tolist()))


def _alphabet(bpe: Any) -> NDArray[np.int64]:
    """The codes whose character the encoding keeps, ascending."""
    kept = []
    for code in range(bpe.get_vocab_size() + 256):  # each has a token, or some bytes have
        if code in SURROGATES:
            continue
        character = chr(code)
        ids = bpe.encode(character, add_special_tokens=False).ids
        if ids and bpe.decode(ids, skip_special_tokens=False) == character:
            kept.append(code)
    return np.array(kept, dtype=np.int64)
