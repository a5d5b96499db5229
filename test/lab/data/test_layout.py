"""Fault pinned: a dataset that is refused only when it is read, or after an hour of recording."""

from __future__ import annotations

from typing import Any

import pytest

from pi05_lab.data.lerobot_format import DatasetError, Extra, Features, flat_names, next_file


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state_names": ()}, "needs the names"),
        ({"action_names": ("a", "a")}, "once each"),
        ({"extras": {"action": Extra((3,))}}, "cannot be called 'action'"),
        ({"extras": {"timestamp": Extra((1,))}}, "cannot be called 'timestamp'"),
        ({"extras": {"stats/x": Extra((1,))}}, "cannot be called"),
        ({"extras": {"x": Extra(())}}, "at least one entry"),
        ({"extras": {"x": Extra((2, 0))}}, "at least one entry"),
        ({"extras": {"x": Extra((2,), "object")}}, "of type 'object'"),
        ({"cameras": {"a/b": (8, 8)}}, "cannot be recorded"),
        ({"cameras": {"top": (0, 8)}}, "cannot be recorded"),
        ({"cameras": {"top": (9, 8)}, "use_video": True}, "even sizes"),
    ],
)
def test_invalid_features_are_rejected(change: dict[str, Any], reason: str) -> None:
    fields: dict[str, Any] = {"cameras": {}, "state_names": ("a",), "action_names": ("a",)}
    with pytest.raises(DatasetError, match=reason):
        Features(**(fields | change))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"a": 0, "b": 1}, ["a", "b"]),
        (None, ["x_0", "x_1"]),
        (["only one"], ["x_0", "x_1"]),
    ],
)
def test_names_are_read_in_every_form(names: Any, expected: list[str]) -> None:
    assert flat_names(names, 2, "x") == expected


def test_a_full_chunk_is_followed_by_the_next() -> None:
    assert next_file(0, 0) == (0, 1)
    assert next_file(3, 999) == (4, 0)
