"""The first stage of π0.5's training: actions as tokens, learnt, saved, decoded.

Faults: an answer that another prompt was trained for, zeros for an answer that is none, a decoder
that does not see what training showed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from squares_world import make_config, squares, stage, write_dataset  # type: ignore

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import ConfigError
from pi05_lab.training.data import Examples
from pi05_lab.training.losses import encode_with_answers
from pi05_lab.training.plugins import load_plugin
from pi05_lab.training.processing import start
from pi05_lab.training.train import train
from pi05_ros.policy.inference import SampleInputs, no_mark
from pi05_ros.policy.next_token import PROMPTS, TokenSampler, language_model
from pi05_ros.policy.policy import Policy, PolicyOutputError
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import ActionPrefix, Observation

FAST = {"skip": 0, "vocab_size": 256, "length": 24}


def observe(seed: int = 0) -> tuple[Observation, np.ndarray]:
    image, goals = squares(np.random.default_rng(seed))
    return Observation({"cam": image}, np.zeros(2), "touch the red cube", 0.0), goals


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Action tokens of a few images, learnt by heart."""
    folder = tmp_path_factory.mktemp("fast")
    dataset = write_dataset(folder / "data", 6)
    common: dict[str, Any] = {"optimizer": "muon", "hold": 0.5, "final_lr": 0.02, "batch": 8}
    common |= {"lr": 4e-3, "tasks_per_picture": 2}
    stages = [stage(name="tokens", losses={"fast": 1.0}, steps=120, **common)]
    train(make_config(folder / "out", dataset, stages=stages, fast=FAST | {"vocab_size": 64}))
    return folder


@pytest.mark.slow
def test_decoded_tokens_are_the_learnt_actions(learnt: Path) -> None:
    """Of both instructions at the same image; in the robot's units."""
    policy = Policy.from_pretrained(learnt / "out" / "checkpoint", robot="generic", device="cpu")
    assert isinstance(policy.sampler, TokenSampler)
    data = LeRobotDataset(learnt / "data")
    errors = []
    for frame in data.frames_of(data.split(0.2).train).tolist():
        sample = data.sample(frame, 4)
        state = sample.state.astype(np.float64)
        reached = policy.infer(Observation(sample.images, state, sample.task, 0.0)).actions
        errors.append(np.abs(reached - sample.actions).max())
        assert 1 < policy.sampler.tokens <= FAST["length"]
    # half a unit of a coefficient is 0.05, and four of them meet
    assert np.mean(np.array(errors) < 0.15) > 0.8
    with pytest.raises(ValueError, match="cannot continue a prefix"):
        policy.infer(observe()[0], ActionPrefix(np.zeros((2, 2)), 1))


class Forced(TokenSampler):
    """Follows given tokens, and notes what the network would have chosen."""

    fed: list[int]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[int] = []

    def _next(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(int(super()._next(hidden)))
        return torch.tensor(self.fed[len(self.seen) - 1])


def test_the_decoder_sees_what_training_shows(tmp_path: Path, dataset: Path) -> None:
    """Token by token with a cache, the logits are those of one pass; for each kind of prompt."""
    for prompt in PROMPTS:
        config = make_config(
            tmp_path, dataset, stages=[stage(losses={"fast": 1.0})], fast=FAST | {"prompt": prompt}
        )
        data = [LeRobotDataset(dataset)]
        network, processor = start(config, data, load_plugin(config))
        network.eval()
        batch = Examples(data, config, processor).batch(config.stages[0], (0, 0, 0))
        assert batch.answers is not None and batch.answer_masks is not None
        language = processor.language
        assert language is not None
        inputs = (batch.images[:1], batch.image_masks[:1], batch.tokens[:1], batch.token_masks[:1])
        one = {"answers": batch.answers[:1], "answer_masks": batch.answer_masks[:1]}
        _, hidden = encode_with_answers(network, *inputs, batch=type(batch)(**vars(batch) | one))
        expected = (hidden @ network.embedder.weight.T).argmax(-1)[0].tolist()
        answer = batch.answers[0][batch.answer_masks[0]].tolist()
        begin = len(language.begin)
        assert answer[:begin] == language.begin and answer[-1] == language.text.eos

        sampler = Forced(network, language, 2)
        sampler.fed = answer[begin:]
        tokens = Tokens(batch.tokens[0].numpy(), batch.token_masks[0].numpy())
        present = tuple(batch.image_masks[0].tolist())
        noise = torch.zeros(1)
        chunk = sampler.sample(SampleInputs(inputs[0], present, tokens, noise), no_mark)
        assert sampler.seen == expected[begin : begin + len(sampler.seen)], prompt
        np.testing.assert_allclose(chunk[0, :, :2], batch.actions[0, :, :2], atol=0.15)


def test_an_answer_that_is_no_chunk_is_an_error(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [stage(losses={"fast": 1.0}, steps=1), stage(name="after", steps=1)]
    train(make_config(tmp_path, dataset, stages=stages, fast=FAST))
    folder = tmp_path / "checkpoint"
    flow = Policy.from_pretrained(folder, robot="generic", device="cpu")
    assert not isinstance(flow.sampler, TokenSampler)
    policy = Policy.from_pretrained(folder, robot="generic", device="cpu", head="fast")
    sampler = policy.sampler
    assert isinstance(sampler, TokenSampler)
    monkeypatch.setattr(sampler, "_next", lambda hidden: torch.tensor(1))
    with pytest.raises(PolicyOutputError, match="no tokens: there is no chunk"):
        policy.infer(observe()[0])
    with pytest.raises(ValueError, match="head must be one of flow, fast"):
        Policy.from_pretrained(folder, robot="generic", device="cpu", head="both")
    (folder / "action_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Policy.from_pretrained(folder, robot="generic", device="cpu", head="fast")


def test_action_tokens_that_do_not_fit_are_named(tmp_path: Path, dataset: Path) -> None:
    def begin(**fast: Any) -> None:
        config = make_config(
            tmp_path, dataset, stages=[stage(losses={"fast": 1.0})], fast=FAST | fast
        )
        data = [LeRobotDataset(dataset)]
        _, processor = start(config, data, load_plugin(config))
        Examples(data, config, processor).batch(config.stages[0], (0, 0, 0))

    with pytest.raises(ConfigError, match=r"fast: .* symbols do not fit 16 tokens"):
        begin(vocab_size=16)
    with pytest.raises(ConfigError, match=r"fast\.length: a chunk needs \d+ tokens"):
        begin(length=3)
    with pytest.raises(ConfigError, match=r"fast: .*processor_config\.json"):
        begin(tokenizer=str(tmp_path))


def test_action_tokens_of_the_start_are_kept(tmp_path: Path, dataset: Path) -> None:
    """Fault: they were looked for in a folder that was deleted before."""
    tokens = [stage(losses={"fast": 1.0}, steps=1)]
    train(make_config(tmp_path, dataset, stages=tokens, fast=FAST))
    again: dict[str, Any] = {
        "network": {"start": str(tmp_path / "checkpoint")},
        "fast": FAST | {"tokenizer": "start"},
        "stages": tokens,
    }
    data = [LeRobotDataset(dataset)]
    first, second = (
        start(config, data, load_plugin(config))[1].language
        for config in (
            make_config(tmp_path, dataset, stages=tokens, fast=FAST),
            make_config(tmp_path, dataset, **again),
        )
    )
    assert first is not None and second is not None
    chunk = np.random.default_rng(0).uniform(-1, 1, (4, 2)).astype(np.float32)
    assert second.answer(chunk) == first.answer(chunk)


def test_a_prompt_that_the_flow_head_does_not_read_is_refused(tmp_path: Path) -> None:
    """Fault: the flow trained on π0-FAST's prompt, and met π0.5's in inference."""
    stages = [stage(losses={"flow": 1.0, "fast": 1.0})]
    with pytest.raises(ConfigError, match="prompt: openpi is for the loss fast alone"):
        make_config(tmp_path, tmp_path, stages=stages, fast=FAST | {"prompt": "openpi"})


def test_paligemmas_places_are_openpis() -> None:
    """257,023 - id, its own inverse; the last 128 entries stay."""
    from types import SimpleNamespace

    from pi05_ros.policy.next_token import ActionLanguage, FastConfig

    text: Any = SimpleNamespace(vocab=257_152, eos=1, bos=2, token_ids=lambda _: [235_371])
    tokenizer: Any = SimpleNamespace(vocab_size=2048)
    language = ActionLanguage(tokenizer, text, FastConfig())
    assert language.to_network([0, 1, 2047]) == [257_023, 257_022, 254_976]
    assert language.to_network(language.to_network([5, 1023])) == [5, 1023]
    with pytest.raises(CheckpointError, match="do not fit the network's vocabulary of 2000"):
        ActionLanguage(tokenizer, SimpleNamespace(**vars(text) | {"vocab": 2000}), FastConfig())  # type: ignore[arg-type]


def test_prompts_are_their_sources(dataset: Path, tmp_path: Path) -> None:
    """openpi's in lower case; LeRobot's with a BOS before the answer."""
    prompts = {}
    for prompt in PROMPTS:
        config = make_config(
            tmp_path, dataset, stages=[stage(losses={"fast": 1.0})], fast=FAST | {"prompt": prompt}
        )
        language = start(config, [LeRobotDataset(dataset)], load_plugin(config))[1].language
        assert language is not None
        prompts[prompt] = (language.prompt("Touch the_Cube ", [0.0, 1.0]), language.begin)
        bos = language.text.bos
        action = language.text.token_ids("Action: ")
    assert prompts == {
        "pi05": ("Task: Touch the Cube, State: 128 255;\nAction: ", []),
        "openpi": ("Task: touch the cube, State: 128 255;\n", action),
        "lerobot": ("Task: Touch the Cube, State: 128 255;\n", [bos, *action]),
    }


def test_the_language_model_with_a_cache_is_the_one_without(tmp_path: Path, dataset: Path) -> None:
    from pi05_ros.policy.model import rotary

    network, _ = start(make_config(tmp_path, dataset), [LeRobotDataset(dataset)],
                       load_plugin(make_config(tmp_path, dataset)))  # fmt: skip
    x = torch.randn(2, 6, 48)
    angles = rotary(torch.arange(6).expand(2, -1), 16)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    whole, _ = language_model(network, x, angles, causal)
    first, cache = language_model(network, x[:, :4], type(angles)(*(a[:, :, :4] for a in angles)),
                                  causal[:4, :4])  # fmt: skip
    rest, _ = language_model(network, x[:, 4:], type(angles)(*(a[:, :, 4:] for a in angles)),
                             causal[4:], cache)  # fmt: skip
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, atol=1e-5, rtol=1e-5)
