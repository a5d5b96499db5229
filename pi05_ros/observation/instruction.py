"""What a person may ask the robot for."""

from __future__ import annotations

import unicodedata
from typing import Any

_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


class InstructionError(ValueError):
    """A text that is no instruction; one line says why."""


def checked_instruction(text: Any, max_chars: int) -> str:
    """One plain line without surrounding blanks.

    Raises:
        InstructionError: If it is not text, empty, longer than `max_chars` or has control
            characters.
    """
    if not isinstance(text, str):
        raise InstructionError(f"the instruction must be text, got {type(text).__name__}")
    text = text.strip()
    if not text:
        raise InstructionError("the instruction is empty, say what the robot should do")
    if len(text) > max_chars:
        raise InstructionError(
            f"the instruction has {len(text)} characters, shorten it to {max_chars}"
        )
    for i, character in enumerate(text):
        if unicodedata.category(character) in _UNPRINTABLE:
            raise InstructionError(
                f"the instruction has the control character U+{ord(character):04X} at {i}, "
                "give one plain line"
            )
    return text
