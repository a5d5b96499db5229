"""The list of mutations must fit the source that it is to be tried on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "test"))

from mutations import MUTATIONS, Mutation  # noqa: E402


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.promise}: {m.what}")
def test_what_is_to_be_taken_out_is_there_once(mutation: Mutation) -> None:
    """Pins: a protection that was rewritten, and whose mutation nobody can try any more."""
    text = (ROOT / "pi05_ros" / mutation.file).read_text(encoding="utf-8")
    for before, after in mutation.edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    compile(text, mutation.file, "exec")
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text(encoding="utf-8")


def test_every_promise_is_taken_out_once() -> None:
    """docs/reliability.md numbers them 1 to 28."""
    assert {mutation.promise for mutation in MUTATIONS} == set(range(1, 29))
