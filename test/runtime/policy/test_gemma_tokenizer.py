"""π0.5's own tokens; fault: prompts that the trained network has never seen in this form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_ros.policy.prompt import PromptTokenizer, pi0_prompt, pi05_prompt

DATA = Path(__file__).parents[2] / "data" / "gemma_tokenizer"
EXAMPLES = json.loads((DATA / "examples.json").read_text(encoding="utf-8"))
CUPS = "Task: pick up the red cup, State: 0 128 255 64;\nAction: "
DIGIT = {"0": 235276, "1": 235274, "2": 235284, "8": 235321}
SPACE, NEWLINE = 235248, 108


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("gemma")
    shutil.copy(DATA / "tokenizer.json", folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return PromptTokenizer.from_directory(folder, 200, 257_152)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["text"][:20])
def test_examples(tokenizer: PromptTokenizer, example: dict[str, Any]) -> None:
    """Fault: a second BOS, a dummy space in front, spaces stripped, bytes not in order."""
    tokens = tokenizer.encode(example["text"])
    ids = example["ids"]
    assert tokens.ids[tokens.mask].tolist() == ids
    assert tokens.mask.sum() == len(ids) and tokens.dropped == 0
    assert (tokens.ids[len(ids) :] == 0).all() and len(tokens.ids) == 200
    assert tokenizer.decode(tokens) == example["text"]


def test_a_prompt_from_its_parts(tokenizer: PromptTokenizer) -> None:
    """Fault: bins, text and tokens that agree each with its own test and not with each other."""
    state = (np.array([0, 128, 255, 64]) + 0.5) / 128 - 1
    text = pi05_prompt("pick_up the red cup\n", state)
    assert text == CUPS
    ids = tokenizer.encode(text).ids
    assert ids[:5].tolist() == [2, 7071, 235292, 4788, 908]
    number = [SPACE, DIGIT["1"], DIGIT["2"], DIGIT["8"]]
    assert [DIGIT["0"], *number] == ids[12:17].tolist(), "digits are tokens of their own"


def test_pi0s_prompt_ends_with_the_newline_token(tokenizer: PromptTokenizer) -> None:
    """Fault: the newline joined to the last word."""
    tokens = tokenizer.encode(pi0_prompt("put the blue block into the box", "openpi"))
    assert tokens.ids[tokens.mask][-1] == NEWLINE


def test_what_is_cut_is_counted(tokenizer: PromptTokenizer) -> None:
    """Fault: the state is lost and nobody hears of it."""
    short = PromptTokenizer(tokenizer._tokenizer, 12, 257_152)
    tokens = short.encode(CUPS)
    assert tokens.dropped == 29 - 12 and tokens.mask.all()
