"""openpi's JAX checkpoints; faults: a matrix that is not turned, heads in another order."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore
import torch
from safetensors.torch import load_file

from pi05_lab.data import openpi_jax as orbax
from pi05_lab.data.openpi_jax import convert
from pi05_ros.policy.checkpoint import load_model
from pi05_ros.policy.config import read_config
from pi05_ros.policy.next_token import FastConfig
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data"
JAX = DATA / "openpi_jax"


def test_orbax_gives_the_same_tensors(tmp_path: Path) -> None:
    """Every tensor equals the one that the tree was written from, whose outputs are LeRobot's."""
    config = convert(JAX, tmp_path / "out", horizon=16)
    assert (config.kind, config.horizon, config.max_action_dim) == ("pi05", 16, 32)
    expected = load_file(DATA / "pi05_tiny_f32" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    heads = {name for name in expected if name.endswith("lm_head.weight")}
    assert set(got) == {name.removeprefix("model.") for name in set(expected) - heads}
    for name, tensor in got.items():
        assert torch.equal(tensor, expected["model." + name]), name
    assert (
        load_model(tmp_path / "out").config.sizes == load_model(DATA / "pi05_tiny_f32").config.sizes
    )


def test_assets_are_copied_and_bfloat16_is_written(tmp_path: Path) -> None:
    """Fault: a converted checkpoint without its statistics."""
    shutil.copytree(JAX, tmp_path / "in")
    (tmp_path / "in" / "assets" / "droid").mkdir(parents=True)
    (tmp_path / "in" / "assets" / "droid" / "norm_stats.json").write_text("{}")
    convert(tmp_path / "in" / "params", tmp_path / "out", dtype="bfloat16")
    assert (tmp_path / "out" / "assets" / "droid" / "norm_stats.json").is_file()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["type"] == "pi05" and document["chunk_size"] == 50


def test_pi0s_tree() -> None:
    """Fault: π0's plain norms and its state projection taken for π0.5's."""
    params = orbax.Params(JAX / "params")
    config = orbax.config_from_shapes(params, 16)
    config = replace(config, kind="pi0")
    names = []

    def read(name: str) -> np.ndarray:
        names.append(name)
        known = params.shape(name) if name in params else (3, 4)
        return np.zeros(known, np.float32)

    fake = SimpleNamespace(read=read)
    written = dict(orbax.tensors(fake, config))  # type: ignore[arg-type]
    assert "PaliGemma.llm.layers.pre_attention_norm_1.scale" in names
    assert "state_proj.weight" in written and "action_time_mlp_out.bias" in written
    assert not any(name == "time_mlp_in.kernel" for name in names)


def test_pi0_fasts_tree(tmp_path: Path) -> None:
    """Without an expert, as openpi's `gemma_fast.py` has it; its cameras and tokens are named."""
    shutil.copytree(JAX, tmp_path / "in")
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path / 'in/params'}/"}}
    store = tensorstore.KvStore.open(spec).result()
    for key in store.list().result():
        if b"PaliGemma" not in key or (b".llm." in key and b"_1." in key):
            store.write(key, None).result()
    config = convert(tmp_path / "in", tmp_path / "out", horizon=10)
    assert (config.kind, config.horizon, config.max_action_dim) == ("pi0_fast", 10, 32)
    assert config.cameras == ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    assert FastConfig.read(read_config(tmp_path / "out")) == FastConfig("openpi")
    expected = load_file(DATA / "pi05_tiny_f32" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert set(got) == {
        name.removeprefix("model.")
        for name in expected
        if ".paligemma." in name and "lm_head" not in name
    }
    for name, tensor in got.items():
        assert torch.equal(tensor, expected["model." + name]), name
    loaded = load_model(tmp_path / "out").config
    assert loaded.sizes.vlm == load_model(DATA / "pi05_tiny_f32").config.sizes.vlm
    cameras = ["base_0_rgb", "left_wrist_0_rgb"]
    assert convert(tmp_path / "in", tmp_path / "two", cameras=cameras).cameras == tuple(cameras)


def test_leaves_may_be_called_value(tmp_path: Path) -> None:
    """Fault: a tree saved with one more level, as openpi's training does, is not recognised."""
    folder = tmp_path / "a folder" / "params"
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    spec = {"driver": "zarr", "kvstore": {**store, "path": "params.a.b.kernel.value"}}
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    written = tensorstore.open(
        spec, create=True, dtype=tensorstore.float32, shape=array.shape
    ).result()
    written.write(array).result()
    params = orbax.Params(folder)
    np.testing.assert_array_equal(params.read("a.b.kernel"), array)
    with pytest.raises(
        CheckpointError, match=r"has no q_einsum: it is not π0's, π0\.5's or π0-FAST's"
    ):
        params.read("q_einsum")


def test_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a traceback of the store, or half a network."""
    with pytest.raises(CheckpointError, match="is not an orbax checkpoint"):
        convert(tmp_path, tmp_path / "out")
    shutil.copytree(JAX, tmp_path / "in")
    with pytest.raises(
        CheckpointError, match=r"has openpi's JAX weights.*pi05_lab\.data\.openpi_jax"
    ):
        load_model(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match=r"pip install 'pi05_ros\[openpi\]'"):
        convert(JAX, tmp_path / "out")


@pytest.mark.parametrize("name", ["params/manifest.ocdbt", "assets/droid/norm_stats.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_special_files_are_rejected(tmp_path: Path, name: str, kind: str) -> None:
    """Fault: a conversion that never ends."""
    path = Path(shutil.copytree(JAX, tmp_path / "in")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        convert(tmp_path / "in", tmp_path / "out", horizon=16)


def spoiled(tmp_path: Path, **metadata: dict[str, object]) -> Path:
    """The folder with other metadata of some arrays, which are named by how their paths end."""
    shutil.copytree(JAX / "params", tmp_path / "in" / "params")
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path / 'in/params'}/"}}
    store = tensorstore.KvStore.open(spec).result()
    for array, changes in metadata.items():
        ending = f"{array}/.zarray".encode()
        key = next(key for key in store.list().result() if key.endswith(ending))
        stored = json.loads(store.read(key).result().value)
        store.write(key, json.dumps(stored | changes).encode()).result()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("array", "metadata", "words"),
    [
        ("encoder_norm.bias", {"dtype": "<c8"}, "complex64"),
        ("encoder_norm.bias", {"compressor": {"id": "zlib", "level": 1}}, "cannot be read"),
        ("encoder_norm.bias", {"shape": [10**12]}, "at most"),
        ("encoder_norm.bias", {"shape": []}, "cannot be read"),
        ("MlpBlock_0.Dense_1.kernel", {"shape": [2], "chunks": [2]}, "instead of"),
        ("attn_vec_einsum.w", {"shape": [3], "chunks": [3]}, "dimensions"),
        ("input_embedding", {"shape": [0, 64]}, "is empty"),
        ("input_embedding", {"shape": [64], "chunks": [64]}, "instead of"),
        ("q_einsum.w", {"shape": [64], "chunks": [64]}, "no network has such shapes"),
    ],
)
def test_invalid_arrays_are_named(
    tmp_path: Path, array: str, metadata: dict[str, object], words: str
) -> None:
    """Pins: what tensorstore, NumPy or an allocation of terabytes raises instead of a reason."""
    with pytest.raises(CheckpointError, match=words):
        convert(spoiled(tmp_path, **{array: metadata}), tmp_path / "out", horizon=16)


def test_a_network_of_millions_of_layers_is_not_built(tmp_path: Path) -> None:
    deep: dict[str, dict[str, object]] = {
        "q_einsum.w": {"shape": [10**7, 8, 64, 16]},
        "q_einsum_1.w": {"shape": [10**7, 8, 32, 16]},
    }
    with pytest.raises(CheckpointError, match="asks for 10000000 layers"):
        convert(spoiled(tmp_path, **deep), tmp_path / "out", horizon=16)
