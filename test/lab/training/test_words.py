"""Where words stand in a prompt; faults: a loss read at the wrong token, which teaches nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policy import tokenizer as small_tokenizer
from small_policy.words import PromptLayout

from pi05_lab.training.config import ConfigError
from pi05_ros.policy.prompt import PromptTokenizer, discretize, pi05_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer.write_tokenizer(folder)
    return PromptTokenizer.from_directory(folder, 96, 100_000)


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.sampled_from("abc redbluX'é 42\n_,"), max_size=20),
    state=st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3),
)
def test_state_tokens_are_the_states(
    tokenizer: PromptTokenizer, text: str, state: list[float]
) -> None:
    """For any instruction: the tokens found are those of the bins, in order."""
    layout = PromptLayout(tokenizer, 3, ["red"])
    tokens = tokenizer.encode(pi05_prompt(text, state))
    found = tokens.ids[layout.state_tokens(tokens.mask)]
    bins = [tokenizer.encode(f" {number}").ids[1] for number in discretize(np.array(state))]
    assert found.tolist() == bins


def test_the_named_object(tokenizer: PromptTokenizer) -> None:
    """The first object named; numbers, words that contain a name, and no name at all."""
    layout = PromptLayout(tokenizer, 2, ["red", "green", "light blue"])

    def named(text: str) -> tuple[int, str]:
        tokens = tokenizer.encode(pi05_prompt(text, [0.0, 0.0]))
        index, token = layout.named_object(tokens.ids)
        return index, tokenizer._tokenizer.decode([int(tokens.ids[token])]).strip()

    assert named("touch the green cube with the left arm") == (1, "green")
    assert named("put the red cube on the green one") == (0, "red")
    assert named("touch the light blue cube")[0] == 2
    assert named("wave with the left arm") == (-1, "<bos>")
    assert named("get ready")[0] == -1


def test_numbers_of_several_tokens_are_refused(tokenizer: PromptTokenizer) -> None:
    """Fault: a joint read at one digit of its number, with PaliGemma's tokenizer."""

    class Digits:
        bos_token_id, pad_token_id = 2, 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) for character in text]}

    with pytest.raises(ConfigError, match="one token per number"):
        PromptLayout(PromptTokenizer(Digits(), 96, 2000), 2, [])
