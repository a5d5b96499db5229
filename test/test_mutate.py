"""Mutations are found by function and syntax tree: a format or a rename elsewhere moves nothing."""

from __future__ import annotations

import pytest
from mutate import mutate

SOURCE = '''
def other(a):
    return a > 1


class Gate:
    def open(self, age_s, limit_s):
        """Grüße."""
        # why
        if (age_s
            > limit_s):
            raise ValueError("old", age_s)
        self.seen = True
        self.count += 1
        return age_s
'''


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("_ > limit_s", "False", "if (False):"),
        ("self.seen = True", "pass", "        pass\n        self.count += 1"),
        ("self.seen = _\nself.count += _", "pass", "        pass\n        return age_s"),
        ("if _ > _:\n    _", "pass", "# why\n        pass\n        self.seen"),
        ("raise ValueError(___)", "return 1", "            return 1\n"),
    ],
)
def test_one_place_of_the_function_changes(old: str, new: str, expected: str) -> None:
    changed = mutate(SOURCE, "Gate.open", old, new)
    assert expected in changed
    assert "return a > 1" in changed and "Grüße" in changed


@pytest.mark.parametrize(
    ("function", "old"), [("Gate.close", "age_s"), ("Gate.open", "_ < _"), ("Gate.open", "age_s")]
)
def test_no_or_several_places_are_an_error(function: str, old: str) -> None:
    with pytest.raises(LookupError):
        mutate(SOURCE, function, old, "1")
