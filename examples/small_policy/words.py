"""Indices of the state's numbers and of an object's name in the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pi05_lab.training.config import ConfigError
from pi05_ros.policy.prompt import PromptTokenizer, pi05_prompt


class PromptLayout:
    """Finds the tokens that the losses read at."""

    def __init__(self, tokenizer: PromptTokenizer, state_dim: int, names: Sequence[str]) -> None:
        """Find the layout from an example.

        Raises:
            ConfigError: the tokenizer splits numbers, so that a joint has no token of its own.
        """
        example = tokenizer.encode(pi05_prompt("go", np.linspace(-0.9, 0.9, state_dim)))
        ids = example.ids[example.mask]
        bins = pi05_prompt("go", np.linspace(-0.9, 0.9, state_dim)).split("State: ")[1]
        numbers = [_tokens(tokenizer, f" {n}") for n in bins.split(";")[0].split()]
        if any(len(number) != 1 for number in numbers):
            raise ConfigError(
                "the losses chunk and named_position need a tokenizer with one token per number; "
                "leave them out"
            )
        wanted = [number[0] for number in numbers]
        begin = next(i for i in range(len(ids)) if ids[i : i + state_dim].tolist() == wanted)
        self._from_end = len(ids) - begin
        self._state_dim = state_dim
        self._names = [_tokens(tokenizer, f" {name}") for name in names]

    @property
    def name_ids(self) -> list[int]:
        """The last token of each name."""
        return [name[-1] for name in self._names]

    def state_tokens(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """[state_dim] indices of the state's numbers in a prompt with this padding mask."""
        return np.arange(self._state_dim) + (int(mask.sum()) - self._from_end)

    def named_object(self, ids: NDArray[np.int64]) -> tuple[int, int]:
        """The object that a prompt names first and the index of its last token, or -1 and 0."""
        found = []
        for index, name in enumerate(self._names):
            hits = np.flatnonzero(ids[: len(ids) - len(name) + 1] == name[0])
            for hit in hits:
                if ids[hit : hit + len(name)].tolist() == name:
                    found.append((int(hit) + len(name) - 1, index))
                    break
        if not found:
            return -1, 0
        token, index = min(found)
        return index, token


def _tokens(tokenizer: PromptTokenizer, text: str) -> list[int]:
    tokens = tokenizer.encode(text)
    return [int(token) for token in tokens.ids[tokens.mask][1:]]
