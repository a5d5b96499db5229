"""π0-FAST: a language model without an action expert, from LeRobot's and openpi's files.

Faults: such a checkpoint taken for a damaged π0.5, a head that nobody trained, logits that differ
from Gemma's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_policy.tokenizer import small_config
from tiny_network import tiny  # type: ignore[import-not-found]
from untrained import small_statistics  # type: ignore[import-not-found]

from pi05_ros.check import check
from pi05_ros.policy.checkpoint import CAMERAS, EMBEDDING, LM_HEAD, load_model, save_model
from pi05_ros.policy.inference import SampleInputs, no_mark
from pi05_ros.policy.model import Pi0, RMSNorm, rotary
from pi05_ros.policy.next_token import FastConfig, TokenSampler, embed, language_model
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.processing import FAST_PROMPT_STEP, write_processing
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import Observation

FAST = Path(__file__).parents[2] / "data" / "fast"
SYMBOLS = 1024
"""Of the goldens' action tokenizer."""


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint as LeRobot's π0-FAST writes it, with random weights."""
    path = Path(shutil.copytree(small_folder, tmp_path / "fast"))
    (path / "pi05_ros.json").unlink()
    plain = small_config()
    sizes = replace(plain.sizes, vocab=plain.sizes.vocab + SYMBOLS)
    raw = {"max_action_tokens": 200, "fast_skip_tokens": 0, "action_tokenizer_name": "no/where"}
    config = replace(plain, kind="pi0_fast", sizes=sizes, raw=raw)
    torch.manual_seed(0)
    save_model(Pi0(config), path)
    write_processing(path, config, small_statistics())
    steps = path / "policy_preprocessor.json"
    steps.write_text(steps.read_text().replace("pi0_new_line_processor", FAST_PROMPT_STEP))
    tokens = path / "action_tokenizer"
    tokens.mkdir()
    shutil.copy(FAST / "tokenizer.json", tokens)
    meta = json.loads((FAST / "meta.json").read_text())
    processor = {"scale": meta["scale"], "min_token": meta["min_token"]}
    (tokens / "processor_config.json").write_text(json.dumps(processor))
    return path


def load(path: Path, **options: Any) -> Policy:
    return Policy.from_pretrained(path, device="cpu", **options)


def forced(sampler: TokenSampler, answer: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampler follow an answer."""
    left = iter(answer)
    monkeypatch.setattr(sampler, "_next", lambda hidden: torch.tensor(next(left)))


def test_a_checkpoint_without_expert_decodes_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json names neither head nor placement: LeRobot's names are read."""
    policy = load(folder)
    assert policy.description.startswith("π0-FAST, ")
    sampler = policy.sampler
    assert isinstance(sampler, TokenSampler)
    language = sampler._language
    assert language.config == FastConfig("lerobot", skip=0, length=200)
    assert language.prompt("Lift_it", np.zeros(2)) == "Task: Lift it, State: 128 128;\n"
    chunks = np.load(FAST / "chunks.npz")["test"]
    answer, _ = language.answer(chunks[0])
    assert answer[: len(language.begin)] == language.begin
    forced(sampler, answer[len(language.begin) :], monkeypatch)
    images = {name: np.zeros((84, 112, 3), np.uint8) for name in CAMERAS}
    chunk = policy.infer(Observation(images, np.zeros(14), "wave", 0.0))
    assert chunk.normalized is not None
    decoded = language.tokenizer.decode(language.tokenizer.encode(chunks[0]).ids, 50, 14).actions
    np.testing.assert_allclose(chunk.normalized[:, :14], decoded, atol=1e-6)


def test_a_saved_network_is_read_back(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    assert not hasattr(model.experts, "action") and not hasattr(model, "action_in_proj")
    save_model(model, tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_check_describes_it(folder: Path) -> None:
    report = check(folder)
    assert report.runs, report.problems
    assert report.kind == "pi0_fast" and report.state_in_prompt is True
    (folder / "action_tokenizer" / "tokenizer.json").unlink()
    assert any("tokenizer.json" in problem for problem in check(folder).problems)


def test_faults_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match='π0-FAST has no action expert: use head "fast"'):
        load(folder, head="flow")
    shutil.rmtree(folder / "action_tokenizer")
    with pytest.raises(CheckpointError, match="no/where is not in the Hugging Face cache"):
        load(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model." + LM_HEAD].clone()
    tensors["model." + LM_HEAD] = head + 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from .*embed_tokens"):
        load_model(folder)
    del tensors["model." + EMBEDDING]
    save_file(tensors, file)
    assert torch.equal(load_model(folder).embedder.weight, head + 1)
    tensors["model.paligemma_with_expert.gemma_expert.lm_head.weight"] = head.clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"is not π0\.5, π0 or π0-FAST"):
        load_model(folder)


@pytest.mark.parametrize("prompt", ["openpi", "lerobot"])
def test_an_absent_camera_is_black_for_openpis_networks(prompt: str) -> None:
    """openpi trains π0-FAST with black images where LeRobot masks them."""
    seen: list[int] = []
    network = Pi0(tiny("pi0_fast")).eval()
    embed = network.embed_images

    def watched(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape[1])
        return embed(images)

    network.embed_images = watched  # type: ignore[method-assign]
    language = SimpleNamespace(
        config=FastConfig(prompt, skip=0, length=4),
        begin=[],
        stop=set(range(64)),
        read=lambda ids, horizon, dim: np.zeros((horizon, dim)),
    )
    sampler = TokenSampler(network, language, 4)  # type: ignore[arg-type]
    tokens = Tokens(np.arange(1, 9), np.ones(8, bool))
    inputs = SampleInputs(torch.zeros(1, 3, 3, 28, 28), (True, False, True), tokens, torch.zeros(1))
    sampler.sample(inputs, no_mark)
    assert seen == [3 if prompt == "openpi" else 2]


def gemma(network: Pi0) -> Callable[..., torch.Tensor]:
    """transformers' Gemma with the network's weights: tokens, positions, mask → hidden states."""
    from transformers import GemmaConfig, GemmaModel

    size, vocab = network.config.sizes.vlm, network.config.sizes.vocab
    model = GemmaModel(
        GemmaConfig(
            vocab_size=vocab,
            hidden_size=size.width,
            intermediate_size=size.mlp_dim,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).eval()
    state: dict[str, Any] = {"embed_tokens.weight": network.embedder.weight}
    rows = [heads * size.head_dim for heads in (size.heads, size.kv_heads, size.kv_heads)]
    for n, layer in enumerate(network.experts.vlm.layers):
        for part, weight in zip("qkv", layer.qkv.weight.split(rows), strict=True):
            state[f"layers.{n}.self_attn.{part}_proj.weight"] = weight
        gate, up = layer.gate_up.weight.chunk(2)
        state |= {
            f"layers.{n}.self_attn.o_proj.weight": layer.out.weight,
            f"layers.{n}.mlp.gate_proj.weight": gate,
            f"layers.{n}.mlp.up_proj.weight": up,
            f"layers.{n}.mlp.down_proj.weight": layer.down.weight,
            f"layers.{n}.input_layernorm.weight": layer.attention_norm.weight,
            f"layers.{n}.post_attention_layernorm.weight": layer.mlp_norm.weight,
        }
    state["norm.weight"] = network.experts.vlm.final_norm.weight
    model.load_state_dict({name: tensor.detach() for name, tensor in state.items()})

    def run(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        found = model(input_ids=tokens, position_ids=positions, attention_mask=bias)
        hidden: torch.Tensor = found.last_hidden_state
        return hidden

    return run


@torch.inference_mode()
def test_the_language_model_is_gemmas() -> None:
    """One block, then causal tokens, one pass or with a cache, within float32's rounding."""
    torch.manual_seed(1)
    network = Pi0(tiny("pi0_fast")).eval()
    for norm in network.modules():
        if isinstance(norm, RMSNorm):
            torch.nn.init.normal_(norm.weight, std=0.3)
    block, more = 9, 5
    length = block + more
    tokens = torch.randint(0, 64, (1, length))
    x = embed(network, tokens)
    positions = torch.arange(length)[None]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:block, :block] = True
    expected = gemma(network)(tokens, positions, mask[None, None])
    whole, _ = language_model(network, x, rotary(positions, 16), mask[None, None])
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    hidden, cache = language_model(network, x[:, :block], rotary(positions[:, :block], 16), None)
    parts = [hidden]
    for n in range(block, length):
        angles = rotary(positions[:, n : n + 1], 16)
        hidden, cache = language_model(network, x[:, n : n + 1], angles, None, cache)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)
