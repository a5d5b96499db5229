"""Faults pinned: an instruction that is not understood as what it was made from, held-out wordings
that were trained or that use words no training shows, words that fall apart into letters."""

from __future__ import annotations

import numpy as np
import pytest
from small_policy.tokenizer import entries

from pi05_lab.sim.scene import CUBE_COLORS
from pi05_lab.sim.tasks import VERBS, Task, all_tasks, instruction, parse, wordings

EVERY_TASK = all_tasks(tuple(CUBE_COLORS))


def test_every_wording_of_every_task_is_understood() -> None:
    texts = [
        (text, task) for task in EVERY_TASK for out in (False, True) for text in wordings(task, out)
    ]
    assert len(texts) == (3 * 8 + 2 + 1) * 9
    assert all(parse(text) == task for text, task in texts)
    assert len({text for text, _ in texts}) == len(texts)


def test_the_number_of_tasks() -> None:
    assert len(all_tasks()) == 3 * 6 + 2 + 1
    assert all_tasks(("red",), ("pick",)) == [
        Task("pick", "left", "red"),
        Task("pick", "right", "red"),
    ]
    assert len(set(EVERY_TASK)) == len(EVERY_TASK)


def test_capitals_spaces_and_punctuation_make_no_difference() -> None:
    assert parse("  Touch the RED cube,  with the left arm! ") == Task("touch", "left", "red")


@pytest.mark.parametrize(
    "text",
    ["", "dance", "touch the purple cube with the left arm", "touch the red cube", "go home now"],
)
def test_other_sentences_are_not_understood(text: str) -> None:
    assert parse(text) is None


def test_instruction_draws_from_the_requested_wordings() -> None:
    task, rng = Task("pick", "right", "blue"), np.random.default_rng(0)
    for held_out in (False, True):
        drawn = {instruction(task, rng, held_out) for _ in range(200)}
        assert drawn == set(wordings(task, held_out))


@pytest.mark.parametrize("verb", VERBS)
def test_held_out_wordings_are_unseen_but_their_words_are_seen(verb: str) -> None:
    (task, *_) = all_tasks(verbs=(verb,))
    trained, held_out = wordings(task), wordings(task, held_out=True)
    assert not set(trained) & set(held_out)
    assert set(" ".join(held_out).split()) <= set(" ".join(trained).split())


def test_every_word_is_one_token() -> None:
    vocabulary, _ = entries()
    words = {
        word
        for task in EVERY_TASK
        for out in (False, True)
        for text in wordings(task, out)
        for word in text.split()
    }
    assert [word for word in sorted(words) if f" {word}" not in vocabulary] == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (("throw", "left", "red"), "verb"),
        (("touch", None, "red"), "side"),
        (("touch", "left", None), "color"),
        (("touch", "left", "pink"), "color"),
        (("wave", "left", "red"), "color"),
        (("home", "left", None), "side"),
    ],
)
def test_an_invalid_task_is_rejected(
    fields: tuple[str, str | None, str | None], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Task(*fields)
