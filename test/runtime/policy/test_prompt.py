"""Prompt and tokens; faults: other bins, another text, a prompt that is cut without notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policy.tokenizer import vocabulary_size, write_tokenizer

from pi05_ros.policy.prompt import PromptTokenizer, discretize, pi0_prompt, pi05_prompt
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "processing"
CASES = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def long_tokenizer(directory: Path) -> PromptTokenizer:
    return PromptTokenizer.from_directory(directory, 300, vocabulary_size())


@pytest.mark.parametrize("case", CASES)
def test_bins_and_prompts_as_lerobot(case: dict[str, Any]) -> None:
    """Fault: bins clipped to 0-255, the state padded to 32, the trailing space lost."""
    state = np.array(case["normalised"], dtype=np.float32)
    assert discretize(state).tolist() == case["bins"]
    if case["policy"] == "pi05":
        assert pi05_prompt(case["prompt"], state) == case["full_prompt"][0]
    else:
        assert pi0_prompt(case["prompt"], "lerobot") == case["full_prompt"][0]


def test_openpis_pi0_prompt_is_cleaned() -> None:
    """Fault: LeRobot's uncleaned text for an openpi checkpoint."""
    assert pi0_prompt("  Uncap_the\npen \n", "openpi") == "Uncap the pen\n"
    assert pi0_prompt("a\n", "lerobot") == "a\n"


@given(st.floats(-5, 5))
def test_bin_of_any_value(value: float) -> None:
    """Fault: an edge that belongs to the wrong bin; the rule is floor((v + 1) · 128)."""
    expected = -1 if value < -1 else min(255, int(np.floor((value + 1) * 128)))
    # v + 1 rounds for tiny negative v, where the edge itself is exact
    if -1e-15 < value < 0:
        expected = 127
    assert discretize([value])[0] == expected


def test_tokens_are_padded_at_the_right(directory: Path) -> None:
    """Fault: no BOS, left padding, or a mask that hides the prompt."""
    tokenizer = PromptTokenizer.from_directory(directory, 10, vocabulary_size())
    tokens = tokenizer.encode("touch the cube")
    assert tokens.ids[0] == 2
    assert tokens.ids.shape == tokens.mask.shape == (10,)
    assert tokens.mask.tolist() == [True] * int(tokens.mask.sum()) + [False] * (
        10 - int(tokens.mask.sum())
    )
    assert (tokens.ids[~tokens.mask] == 0).all()
    assert tokens.dropped == 0
    assert tokenizer.decode(tokens) == "touch the cube"


def test_truncation_is_counted(directory: Path) -> None:
    """Fault: the state cut off the prompt's end without a word."""
    tokenizer = PromptTokenizer.from_directory(directory, 10, vocabulary_size())
    tokens = tokenizer.encode("\n" * 25)  # a token each
    assert tokens.mask.all() and tokens.dropped == 16
    assert tokenizer.encode("\n" * 9).dropped == 0


def test_a_token_without_an_embedding_is_refused(directory: Path) -> None:
    """Fault: an index error inside the network, or on CUDA a dead process."""
    tokenizer = PromptTokenizer.from_directory(directory, 10, 20)
    with pytest.raises(ValueError, match="outside the network's vocabulary of 20"):
        tokenizer.encode("a")


def test_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    """Fault: a download attempt, or a stack trace without the remedy."""
    with pytest.raises(CheckpointError, match=r"no tokenizer: put tokenizer\.json.*paligemma"):
        PromptTokenizer.from_directory(tmp_path, 10, 10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*put tokenizer\.json"):
        PromptTokenizer.from_directory(tmp_path, 10, 10)


def test_a_tokenizer_without_bos_is_refused(directory: Path, tmp_path: Path) -> None:
    """Fault: a prompt that begins without the token that every training prompt had."""
    settings_ = json.loads((directory / "tokenizer_config.json").read_text())
    del settings_["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="no bos_token"):
        PromptTokenizer.from_directory(tmp_path, 10, 10)


def test_small_tokenizer_spends_one_token_a_number_and_word(
    long_tokenizer: PromptTokenizer,
) -> None:
    """Fault: bins split into digits, which would double the prompt."""
    for number in range(-1, 256):
        assert long_tokenizer.encode(f" {number}").mask.sum() == 2
    prompt = pi05_prompt("pick up the red cube with the left arm", np.linspace(-1.1, 1.1, 14))
    # BOS, "Task:", 9 words, ",", " State:", 14 bins, ";", newline, "Action:", " "
    assert long_tokenizer.encode(prompt).mask.sum() == 31


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_small_tokenizer_loses_no_text(long_tokenizer: PromptTokenizer, text: str) -> None:
    """Fault: a character outside the vocabulary becomes <unk>, a space is added or eaten."""
    assert long_tokenizer.decode(long_tokenizer.encode(text)) == text


def test_the_widest_state_takes_the_most_tokens(long_tokenizer: PromptTokenizer) -> None:
    """Fault: room for an instruction promised by a state with short numbers."""
    widest = len(long_tokenizer.token_ids(pi05_prompt("", [long_tokenizer.widest_state] * 14)))
    for value in np.linspace(-1.1, 1.1, 300):
        assert len(long_tokenizer.token_ids(pi05_prompt("", [value] * 14))) <= widest


def anonymous_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))


def test_prompts_leave_no_memory_behind(long_tokenizer: PromptTokenizer) -> None:
    """Fault: 3 kB for each state, as a word that the tokenizer keeps."""
    rng = np.random.default_rng(0)

    def encode(times: int) -> None:
        for _ in range(times):
            long_tokenizer.encode(pi05_prompt("wave", rng.uniform(-1, 1, 14)))

    encode(100)
    before_mb = anonymous_mb()
    encode(2000)
    assert anonymous_mb() - before_mb < 2.0


# π0.5's own tokens

GEMMA = Path(__file__).parents[2] / "data" / "gemma_tokenizer"
EXAMPLES = json.loads((GEMMA / "examples.json").read_text(encoding="utf-8"))
CUPS = "Task: pick up the red cup, State: 0 128 255 64;\nAction: "
DIGIT = {"0": 235276, "1": 235274, "2": 235284, "8": 235321}
SPACE, NEWLINE = 235248, 108


@pytest.fixture(scope="module")
def gemma_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("gemma")
    shutil.copy(GEMMA / "tokenizer.json", folder)
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
def test_gemmas_examples(gemma_tokenizer: PromptTokenizer, example: dict[str, Any]) -> None:
    """Fault: a second BOS, a dummy space in front, spaces stripped, bytes not in order."""
    tokens = gemma_tokenizer.encode(example["text"])
    ids = example["ids"]
    assert tokens.ids[tokens.mask].tolist() == ids
    assert tokens.mask.sum() == len(ids) and tokens.dropped == 0
    assert (tokens.ids[len(ids) :] == 0).all() and len(tokens.ids) == 200
    assert gemma_tokenizer.decode(tokens) == example["text"]


def test_a_prompt_from_its_parts(gemma_tokenizer: PromptTokenizer) -> None:
    """Fault: bins, text and tokens that agree each with its own test and not with each other."""
    state = (np.array([0, 128, 255, 64]) + 0.5) / 128 - 1
    text = pi05_prompt("pick_up the red cup\n", state)
    assert text == CUPS
    ids = gemma_tokenizer.encode(text).ids
    assert ids[:5].tolist() == [2, 7071, 235292, 4788, 908]
    number = [SPACE, DIGIT["1"], DIGIT["2"], DIGIT["8"]]
    assert [DIGIT["0"], *number] == ids[12:17].tolist(), "digits are tokens of their own"


def test_pi0s_prompt_ends_with_the_newline_token(gemma_tokenizer: PromptTokenizer) -> None:
    """Fault: the newline joined to the last word."""
    tokens = gemma_tokenizer.encode(pi0_prompt("put the blue block into the box", "openpi"))
    assert tokens.ids[tokens.mask][-1] == NEWLINE


def test_cut_gemma_tokens_are_counted(gemma_tokenizer: PromptTokenizer) -> None:
    """Fault: the state is lost without notice."""
    short = PromptTokenizer(gemma_tokenizer._tokenizer, 12, 257_152)
    tokens = short.encode(CUPS)
    assert tokens.dropped == 29 - 12 and tokens.mask.all()
