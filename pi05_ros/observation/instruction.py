"""Checks a text before it becomes the robot's instruction."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_REFUSED_CATEGORIES = {
    "Cc": "control character",
    "Cf": "invisible format character",
    "Cn": "unassigned character",
    "Co": "private-use character",
    "Cs": "surrogate",
    "Zl": "line separator",
    "Zp": "paragraph separator",
}
"""Unicode's general categories; Cf: soft hyphen, zero-width and bidirectional characters."""

_INVISIBLE_RANGES = (
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x115F, 0x1160),  # Hangul fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors
    (0x2800, 0x2800),  # Braille pattern without dots
    (0x3164, 0x3164),  # Hangul filler
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
    (0xE0100, 0xE01EF),  # variation selectors
)
"""Invisible characters of other categories: Default_Ignorable_Code_Point and the Braille blank."""

# π0.5's prompt is "Task: …, State: 12 200 …;\nAction: ", and an underscore becomes a blank in it.
_PROMPT_LABEL = re.compile(r"(state|action)[\s_]*:")


class InstructionError(ValueError):
    """A refused text; one line says why."""


def checked_instruction(text: Any, max_chars: int) -> str:
    """The text as one plain line without surrounding blanks.

    Raises:
        InstructionError: not text, empty, longer than `max_chars`, with a control or invisible
            character, or with a label of the policy's prompt, which would introduce false joint
            values: `State:` or `Action:` in any case and compatibility form of Unicode. Similar
            letters of other scripts are accepted, since they are other tokens.
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
        kind = _REFUSED_CATEGORIES.get(unicodedata.category(character))
        if kind is None and any(low <= ord(character) <= high for low, high in _INVISIBLE_RANGES):
            kind = "invisible character"
        if kind:
            name = unicodedata.name(character, "")
            code = f"U+{ord(character):04X}" + (f" ({name})" if name else "")
            raise InstructionError(
                f"the instruction has the {kind} {code} at {i}, give one plain line of visible "
                "characters"
            )
    _refuse_labels(text)
    return text


def _refuse_labels(text: str) -> None:
    """Refuse the labels of the prompt's state block, in the text's compatibility form (NFKC).

    Normalises each character alone, which keeps its index; this omits composition, which only
    affects combining marks, and the labels have none.
    """
    folded, places = "", []
    for i, character in enumerate(text):
        plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", character).casefold())
        folded += plain
        places += [i] * len(plain)
    found = _PROMPT_LABEL.search(folded)
    if found:
        start, end = places[found.start()], places[found.end() - 1] + 1
        raise InstructionError(
            f"the instruction has {text[start:end]!r} at {start}, which the policy's prompt uses "
            "for the robot's own state and actions; leave it out"
        )
