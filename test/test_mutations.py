"""The mutations fit the source, and their tests exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutate import apply
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.promise}: {m.what}")
def test_a_mutation_fits_its_function_once(mutation: Mutation) -> None:
    """Pins: a protection that was rewritten and is never tried again."""
    text = (ROOT / "pi05_ros" / mutation.file).read_text(encoding="utf-8")
    assert apply(text, mutation.edits) != text
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text(encoding="utf-8")


def test_every_promise_has_a_mutation() -> None:
    """docs/reliability.md numbers them 1 to 28."""
    assert {mutation.promise for mutation in MUTATIONS} == set(range(1, 29))
