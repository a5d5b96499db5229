"""Strict loading; fault: a file that fits only partly leaves a partly random network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi05_ros.policy.checkpoint import (
    EMBEDDING,
    EXPERT_LM_HEAD,
    LM_HEAD,
    key_map,
    load_model,
    save_model,
)
from pi05_ros.policy.config import parse_config
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data"
Tensors = dict[str, Tensor]
HEAD_BIAS = "model.action_in_proj.bias"


def full_size_keys(kind: str) -> dict[str, tuple[int, ...]]:
    keys = {}
    for line in (DATA / "keys" / f"{kind}.txt").read_text().splitlines():
        shape, name = line.split()
        keys[name] = tuple(int(n) for n in shape.split("x"))
    return keys


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Path]:
    """The small π0.5's folder after a change of its tensors."""

    def make(change: Callable[[Tensors], None]) -> Path:
        tensors = load_file(DATA / "pi05_tiny_f32" / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        shutil.copy(DATA / "pi05_tiny_f32" / "config.json", tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_full_size_network_has_the_published_tensors(kind: str) -> None:
    with torch.device("meta"):
        model = Pi0(parse_config({}, kind))
    mapped = {
        f"model.{name}": shape
        for source in key_map(model).values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }
    expected = full_size_keys(kind)
    for head in (LM_HEAD, EXPERT_LM_HEAD):
        assert expected.pop(f"model.{head}")[0] == 257_152
    assert mapped == expected
    count = sum(p.numel() for p in model.parameters())
    assert count == {"pi05": 3_353_433_872, "pi0": 3_238_048_528}[kind]


def test_a_saved_network_loads_equal(golden: SimpleNamespace, tmp_path: Path) -> None:
    save_model(golden.model, tmp_path)
    model = load_model(tmp_path)
    assert model.config == golden.model.config
    assert not model.training
    for name, parameter in golden.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert model.get_parameter(name).requires_grad
    theirs = load_file(golden.directory / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    # LeRobot requires both language heads, which are unused.
    heads = {f"model.{LM_HEAD}", f"model.{EXPERT_LM_HEAD}"}
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - heads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_small_networks_are_saved_with_their_sizes(small: Pi0, tmp_path: Path) -> None:
    save_model(small, tmp_path)
    model = load_model(tmp_path)
    assert model.config == small.config
    assert all(torch.equal(p, small.get_parameter(n)) for n, p in model.named_parameters())


def test_a_loaded_network_is_independent_of_its_file(tmp_path: Path) -> None:
    """Parameters that only map the file would change under a running robot."""
    shutil.copytree(DATA / "pi05_tiny_f32", tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path)
    before = model.embedder.weight.detach().clone()
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(model.embedder.weight, before)


@pytest.mark.parametrize("bfloat16_file", [False, True])
def test_bfloat16_keeps_what_is_sensitive_in_float32(tmp_path: Path, bfloat16_file: bool) -> None:
    model = load_model(DATA / "pi05_tiny_f32", dtype=torch.bfloat16)
    if bfloat16_file:
        save_model(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        model = load_model(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {
        "vision.patch.weight",
        "vision.position",
        "experts.action.modulation.weight",
        "experts.vlm.layers.0.attention_norm.weight",
        "time_mlp_in.weight",
        "action_in_proj.weight",
        "action_out_proj.bias",
    } <= kept
    matrices = {"qkv.weight", "out.weight", "gate_up.weight", "down.weight"}
    for stack in ("vlm", "action"):
        assert {f"experts.{stack}.layers.1.{name}" for name in matrices} <= low
    assert {"embedder.weight", "vision.layers.0.qkv.weight", "vision.projector.weight"} <= low


def test_a_bfloat16_file_has_lerobots_dtypes(tmp_path: Path) -> None:
    """Pins: a file that LeRobot loads with another precision than its own bfloat16 files have.

    LeRobot 0.6.1 keeps the vision encoder, the projector, the norms and the heads outside the
    language models in float32 (modeling_pi05.py, `to_bfloat16_for_selected_params`).
    """
    save_model(load_model(DATA / "pi05_tiny_f32", dtype=torch.bfloat16), tmp_path)
    kept = ("vision_tower", "multi_modal_projector", "layernorm", "norm.", "action_", "time_mlp")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        single = any(part in name for part in kept)
        assert tensor.dtype == (torch.float32 if single else torch.bfloat16), name


def test_names_without_model_prefix(
    checkpoint: Callable[[Callable[[Tensors], None]], Path],
) -> None:
    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    model = load_model(checkpoint(strip))
    reference = load_model(DATA / "pi05_tiny_f32")
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())


def test_the_tied_head_replaces_a_missing_embedding(
    checkpoint: Callable[[Callable[[Tensors], None]], Path],
) -> None:
    """Converted files keep the pair under the head's name; in fine-tunes the head is stale."""
    embedding, head = f"model.{EMBEDDING}", f"model.{LM_HEAD}"
    expected = load_file(DATA / "pi05_tiny_f32" / "model.safetensors")[embedding]

    def tied(tensors: Tensors) -> None:
        tensors[head] = tensors.pop(embedding)

    assert torch.equal(load_model(checkpoint(tied)).embedder.weight, expected)

    def stale(tensors: Tensors) -> None:
        tensors[head] = torch.full_like(expected, torch.nan)

    assert torch.equal(load_model(checkpoint(stale)).embedder.weight, expected)


def shard(directory: Path) -> None:
    tensors = load_file(DATA / "pi05_tiny_f32" / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(DATA / "pi05_tiny_f32" / "config.json", directory)


def test_shards(tmp_path: Path) -> None:
    shard(tmp_path)
    model = load_model(tmp_path)
    reference = load_model(DATA / "pi05_tiny_f32")
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors, which is not in the folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("../x.safetensors", "not a file name"), ("x.bin", "pickle"), (3, "not a file name")],
)
def test_an_index_cannot_name_other_folders(tmp_path: Path, file: object, message: str) -> None:
    shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {HEAD_BIAS: file}}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def lose(tensors: Tensors) -> None:
    del tensors[HEAD_BIAS]


def gain(tensors: Tensors) -> None:
    tensors["model.proprio_history_proj.bias"] = torch.zeros(3)


def reshape(tensors: Tensors) -> None:
    tensors[HEAD_BIAS] = torch.zeros(31)


def spoil(tensors: Tensors) -> None:
    tensors[HEAD_BIAS][3] = torch.nan


def quantise(tensors: Tensors) -> None:
    tensors[HEAD_BIAS] = torch.zeros(32, dtype=torch.int8)


def double(tensors: Tensors) -> None:
    tensors[HEAD_BIAS.removeprefix("model.")] = tensors[HEAD_BIAS].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, r"1 missing: action_in_proj\.bias"),
        (gain, r"1 unexpected: proprio_history_proj\.bias"),
        (reshape, r"1 of another shape: action_in_proj\.bias \[31\] instead of \[32\]"),
        (spoil, r"1 not finite: action_in_proj\.bias"),
        (quantise, r"1 not floating-point: action_in_proj\.bias I8"),
        (double, r"'action_in_proj\.bias' twice"),
    ],
)
def test_tensors_that_do_not_fit(
    checkpoint: Callable[[Callable[[Tensors], None]], Path],
    change: Callable[[Tensors], None],
    message: str,
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint(change))


def test_part_of_a_fused_matrix_is_checked_too(
    checkpoint: Callable[[Callable[[Tensors], None]], Path],
) -> None:
    """Q, K, V of the right total but the wrong parts must not pass."""
    attention = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn."

    def change(tensors: Tensors) -> None:
        tensors[attention + "q_proj.weight"] = torch.zeros(127, 32)
        tensors[attention + "k_proj.weight"] = torch.zeros(17, 32)

    with pytest.raises(CheckpointError, match=r"2 of another shape: .*q_proj.*k_proj"):
        load_model(checkpoint(change))


def test_long_lists_are_shortened(checkpoint: Callable[[Callable[[Tensors], None]], Path]) -> None:
    def lose_expert(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".gemma_expert.model.layers." in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"33 missing: .*, and 23 more") as caught:
        load_model(checkpoint(lose_expert))
    assert str(caught.value).count("gemma_expert") == 10


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "policy.pth", "last.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    shutil.copy(DATA / "pi05_tiny_f32" / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="is a pickle, which can run any code"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_model(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", b"x" * 9]
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    shutil.copy(DATA / "pi05_tiny_f32" / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(tmp_path)


def test_a_network_of_millions_of_layers_is_not_built(tmp_path: Path) -> None:
    """Pins: a config.json of a kilobyte that keeps the processor busy for hours."""
    shutil.copy(DATA / "pi05_tiny_f32" / "model.safetensors", tmp_path)
    document = json.loads((DATA / "pi05_tiny_f32" / "config.json").read_text())
    document["sizes"]["vis"][1] = 10**7
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="asks for 10000000 layers"):
        load_model(tmp_path)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    shutil.copytree(DATA / "pi05_tiny_f32", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut off"):
        load_model(tmp_path)


def test_folders_without_config_or_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    shutil.copy(DATA / "pi05_tiny_f32" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(tmp_path)


def test_other_dtypes_are_refused() -> None:
    """In float16 the residual stream overflows."""
    with pytest.raises(ValueError, match="float16"):
        load_model(DATA / "pi05_tiny_f32", dtype=torch.float16)
