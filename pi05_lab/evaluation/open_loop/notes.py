"""What was dropped, repaired or missing, counted by reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![\w.])-?\d+(\.\d+)?(e[+-]?\d+)?(?![\w])")


@dataclass
class Note:
    """One reason."""

    text: str
    """As it was first said."""
    count: int = 1
    first_s: float | None = None
    """Since the recording's start; None where it concerns all of it."""


class Notes:
    """Reasons in the order in which they first came up."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def add(self, text: str, at_s: float | None = None, count: int = 1) -> None:
        """Count a reason; those that differ in numbers alone are the same."""
        key = _NUMBER.sub("#", text)
        if key in self._notes:
            self._notes[key].count += count
        else:
            self._notes[key] = Note(text, count, at_s)

    def __iter__(self) -> Iterator[Note]:
        return iter(self._notes.values())

    def __len__(self) -> int:
        return len(self._notes)


def one_line(error: BaseException) -> str:
    """An error's kind and text without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
