"""What a text must be to become the robot's instruction."""

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
"""Unicode's general categories; Cf has the soft hyphen, zero-width and bidirectional characters."""

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
"""Characters that leave no mark and belong to other categories (Unicode's Default_Ignorable_Code_
Point, and the Braille blank)."""

# π0.5's prompt is "Task: …, State: 12 200 …;\nAction: ", and an underscore becomes a blank in it.
_PROMPT_LABEL = re.compile(r"(state|action)[\s_]*:")


class InstructionError(ValueError):
    """A text that is no instruction; one line says why."""


def checked_instruction(text: Any, max_chars: int) -> str:
    """One plain line without surrounding blanks.

    Letters of other scripts that merely look like a label's (Cyrillic, say) are accepted: the
    network reads them as other tokens than the label.

    Raises:
        InstructionError: If it is not text, empty, longer than `max_chars`, has a control or an
            invisible character, or a label of the policy's prompt: `State:` or `Action:` in any
            case and in any compatibility form of Unicode, which would stand for joint values.
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
        kind = _refused_kind(character)
        if kind:
            raise InstructionError(
                f"the instruction has the {kind} {_named(character)} at {i}, give one plain line "
                "of visible characters"
            )
    _refuse_labels(text)
    return text


def _refused_kind(character: str) -> str | None:
    kind = _REFUSED_CATEGORIES.get(unicodedata.category(character))
    if kind is None and any(low <= ord(character) <= high for low, high in _INVISIBLE_RANGES):
        kind = "invisible character"
    return kind


def _named(character: str) -> str:
    name = unicodedata.name(character, "")
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")


def _refuse_labels(text: str) -> None:
    """Refuse the labels of the prompt's state block, in the text's compatibility form (NFKC).

    Character by character, which keeps the places: composition, which this leaves out, joins
    combining marks alone, and no letter of a label has one.
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
