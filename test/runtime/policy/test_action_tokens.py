"""FAST; faults: tokens that another implementation does not have, symbols that vanish, zeros for an
answer that cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_ros.policy.action_tokens import ActionTokenError, ActionTokenizer
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "fast"
META = json.loads((DATA / "meta.json").read_text())
CLIPPED = 1
"""The chunk with a coefficient outside the alphabet."""


@pytest.fixture(scope="module")
def chunks() -> dict[str, np.ndarray]:
    return dict(np.load(DATA / "chunks.npz"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ActionTokenizer:
    """The reference's encoding, in a folder as it writes it."""
    folder = tmp_path_factory.mktemp("fast")
    shutil.copy(DATA / "tokenizer.json", folder)
    document = {"scale": 10, "vocab_size": 1024, "min_token": META["min_token"],
                "action_dim": 14, "time_horizon": 50}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(document))
    return ActionTokenizer.load(folder)


@pytest.fixture(scope="module")
def fitted(chunks: dict[str, np.ndarray]) -> ActionTokenizer:
    return ActionTokenizer.fit(chunks["fit"])


def test_tokens_and_values_are_the_references(
    reference: ActionTokenizer, fitted: ActionTokenizer, chunks: dict[str, np.ndarray]
) -> None:
    """Ids to the last one, also with an encoding that is fitted here; values to 1e-6."""
    for number, chunk in enumerate(chunks["test"]):
        encoded = reference.encode(chunk)
        assert fitted.encode(chunk) == encoded
        decoded = reference.decode(encoded.ids)
        assert decoded.missing == 0
        if number == CLIPPED:
            assert encoded.clipped == 1 and not chunks["decoded"][number].any()
            assert np.abs(decoded.actions - chunk).max() < 0.5
        else:
            assert encoded.clipped == 0 and encoded.ids == META["ids"][number]
            np.testing.assert_allclose(decoded.actions, chunks["decoded"][number], atol=1e-6)
    assert fitted.min_symbol == META["min_token"] and fitted.vocab_size == 1024


def test_a_folder_is_read_here_and_by_transformers(
    fitted: ActionTokenizer, chunks: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The tokenizer by AutoTokenizer; the processor's settings by their names."""
    from transformers import AutoTokenizer

    fitted.save(tmp_path)
    again = ActionTokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for chunk in chunks["test"][:6]:
        ids = fitted.encode(chunk).ids
        assert again.encode(chunk).ids == ids
        assert theirs(theirs.decode(ids), add_special_tokens=False)["input_ids"] == ids
    settings_ = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings_["processor_class"] == "UniversalActionProcessor"
    assert [settings_[key] for key in ("scale", "min_token", "time_horizon", "action_dim")] == [
        10, META["min_token"], 50, 14,
    ]  # fmt: skip


def test_an_answer_that_is_cut_short_keeps_its_low_frequencies(
    reference: ActionTokenizer, chunks: dict[str, np.ndarray]
) -> None:
    """Fault: all zeros. The error falls with every token that is there."""
    chunk = chunks["test"][0]
    ids = reference.encode(chunk).ids
    errors = []
    for count in range(1, len(ids) + 1):
        decoded = reference.decode(ids[:count])
        errors.append(float(np.square(decoded.actions - chunk).mean()))
    assert decoded.missing == 0
    assert errors[-1] < 0.01 and errors[len(errors) // 2] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no tokens"),
        ([5000], "token 5000 is not one of the 1024"),
        ([-1], "token -1"),
        ([1023] * 3000, "symbols, a chunk of 50 steps"),
    ],
)
def test_what_is_no_chunk_is_an_error(
    reference: ActionTokenizer, ids: list[int], message: str
) -> None:
    with pytest.raises(ActionTokenError, match=message):
        reference.decode(ids)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 1023), min_size=1, max_size=60))
def test_any_tokens_are_a_chunk_or_an_error(reference: ActionTokenizer, ids: list[int]) -> None:
    try:
        decoded = reference.decode(ids)
    except ActionTokenError:
        return
    assert decoded.actions.shape == (50, 14) and np.isfinite(decoded.actions).all()


@settings(max_examples=60, deadline=None)
@given(
    chunk=arrays(
        np.float32, st.tuples(st.integers(1, 12), st.integers(1, 4)),
        elements=st.floats(-3, 3, width=32),
    ),
    scale=st.sampled_from([1.0, 10.0, 30.0]),
)  # fmt: skip
def test_a_round_trip_is_as_exact_as_the_scale(chunk: np.ndarray, scale: float) -> None:
    """Half a unit per coefficient: sqrt(horizon) / (2 · scale) for a value at most."""
    tokenizer = ActionTokenizer.fit(chunk[None], scale, vocab_size=2000)
    encoded = tokenizer.encode(chunk)
    decoded = tokenizer.decode(encoded.ids)
    assert encoded.clipped == 0 and decoded.missing == 0
    bound = 0.5 * np.sqrt(len(chunk)) / scale + 1e-4
    assert np.abs(decoded.actions - chunk).max() <= bound


@settings(max_examples=40, deadline=None)
@given(
    chunk=arrays(np.float32, (50, 14), elements=st.floats(-1e4, 1e4, width=32)),
)
def test_symbols_outside_the_alphabet_are_clipped_and_counted(
    reference: ActionTokenizer, chunk: np.ndarray
) -> None:
    """Fault: a symbol that vanishes moves all later ones to another joint."""
    encoded = reference.encode(chunk)
    assert reference.decode(encoded.ids).missing == 0
    small = reference.encode(np.zeros((50, 14)))
    assert small.clipped == 0
    if np.abs(chunk).max() > 300:
        assert encoded.clipped > 0


def test_bad_chunks_and_files_are_named(
    fitted: ActionTokenizer, chunks: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(ActionTokenError, match=r"must be \[horizon, dim\]"):
        fitted.encode(np.zeros(14))
    with pytest.raises(ActionTokenError, match="not finite"):
        fitted.encode(np.full((50, 14), np.nan))
    with pytest.raises(ActionTokenError, match="symbols do not fit 16 tokens"):
        ActionTokenizer.fit(chunks["fit"], vocab_size=16)
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        ActionTokenizer.load(tmp_path)
    fitted.save(tmp_path)
    for key, value in (("scale", 0), ("min_token", 0.5), ("time_horizon", -1)):
        fitted.save(tmp_path)
        file = tmp_path / "processor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(CheckpointError, match=f"{key} must not be"):
            ActionTokenizer.load(tmp_path)
    fitted.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ActionTokenizer.load(tmp_path)
    universal = ActionTokenizer(fitted._bpe, 10.0, -354)
    with pytest.raises(ActionTokenError, match="has no horizon"):
        universal.decode([5])
    assert universal.decode(universal.encode(chunks["test"][0]).ids, 50, 14).missing == 0
