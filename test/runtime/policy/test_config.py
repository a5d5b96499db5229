"""config.json of LeRobot and openpi; faults: wrong defaults, a trusted `type`, unclear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pi05_ros.policy.config import (
    DEFAULT_CAMERAS,
    GemmaSize,
    PolicyConfig,
    Sizes,
    VisionSize,
    parse_config,
    read_config,
)
from pi05_ros.policy.weights import CheckpointError

DATA = Path(__file__).parents[2] / "data"


def write(directory: Path, document: object, tensors: tuple[str, ...] = ()) -> Path:
    (directory / "config.json").write_text(json.dumps(document))
    if tensors:
        save_file({name: torch.zeros(1) for name in tensors}, directory / "model.safetensors")
    return directory


def test_lerobot_config() -> None:
    config = read_config(DATA / "pi05_tiny_f32")
    assert config.kind == "pi05"
    assert config.sizes.vlm == GemmaSize(64, 3, 128, 8, 1, 16)
    assert config.sizes.exp == GemmaSize(32, 3, 64, 8, 1, 16)
    assert config.sizes.vis == VisionSize(width=48, depth=2, heads=4, mlp_dim=96)
    assert config.sizes.vocab == 2048
    assert (config.horizon, config.token_length, config.image_size) == (16, 32, 224)
    assert (config.max_state_dim, config.max_action_dim, config.num_steps) == (32, 32, 10)
    assert (config.state_dim, config.action_dim) == (14, 14)
    assert config.cameras == DEFAULT_CAMERAS
    assert config.normalization_mapping["STATE"] == "QUANTILES"
    assert read_config(DATA / "pi0_tiny_f32").normalization_mapping["STATE"] == "MEAN_STD"


def test_openpi_config(tmp_path: Path) -> None:
    document = {
        "action_dim": 32,
        "action_horizon": 15,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "bfloat16",
    }
    config = read_config(write(tmp_path, document, ("time_mlp_in.weight",)))
    assert (config.kind, config.horizon, config.max_action_dim) == ("pi05", 15, 32)
    assert config.sizes == Sizes()
    assert config.token_length == 200
    assert config.cameras == DEFAULT_CAMERAS
    assert config.state_dim is None
    assert config.action_dim is None
    assert config.normalization_mapping["ACTION"] == "QUANTILES"
    saved = config.to_json()
    assert saved["chunk_size"] == 15
    assert "sizes" not in saved
    assert not {"action_dim", "action_horizon", "precision"} & set(saved)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("tensor", "kind"), [("state_proj.weight", "pi0"), ("time_mlp_in.weight", "pi05")]
)
def test_tensors_tell_the_kind(tmp_path: Path, prefix: str, tensor: str, kind: str) -> None:
    """A wrong `type` would give the wrong prompt and normalisation without any error."""
    other = {"pi0": "pi05", "pi05": "pi0"}[kind]
    directory = write(tmp_path, {"type": other}, (prefix + tensor,))
    assert read_config(directory).kind == kind


def test_missing_and_unknown_fields_are_no_error(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, {"type": "pi0", "memory_frames": 6, "rtc_config": None}))
    assert (config.kind, config.horizon, config.token_length) == ("pi0", 50, 48)
    assert config.sizes == Sizes()
    assert config.normalization_mapping["STATE"] == "MEAN_STD"


def test_normalization_is_read_from_the_file() -> None:
    mapping = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    config = parse_config({"normalization_mapping": mapping}, "pi05")
    assert config.normalization_mapping == {"VISUAL": "IDENTITY"} | mapping


def test_cameras_keep_their_order_without_the_always_empty_ones() -> None:
    names = ["observation.images.image2", "observation.images.empty_camera_0"]
    features = {name: {"type": "VISUAL", "shape": [3, 224, 224]} for name in names}
    features["observation.state"] = {"type": "STATE", "shape": [8]}
    features["observation.images.image"] = {"type": "VISUAL", "shape": [3, 224, 224]}
    config = parse_config({"input_features": features, "empty_cameras": 1}, "pi05")
    assert config.cameras == ("image2", "image")
    assert config.state_dim == 8


dims = st.integers(1, 64)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["pi05", "pi0"]),
    widths=st.tuples(dims, dims),
    shared=st.tuples(dims, st.integers(1, 4), st.integers(1, 4), dims),
    vis=st.tuples(dims, dims, st.integers(1, 8), dims),
    patches=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    cameras=st.lists(st.text("abc_", min_size=1), min_size=1, max_size=4, unique=True),
    lengths=st.tuples(dims, dims, dims, dims, dims),
)
def test_a_written_config_is_read_back(
    kind: str,
    widths: tuple[int, int],
    shared: tuple[int, int, int, int],
    vis: tuple[int, int, int, int],
    patches: tuple[int, int],
    cameras: list[str],
    lengths: tuple[int, int, int, int, int],
) -> None:
    """A field lost on saving would come back as a default of another size."""
    depth, kv, group, half = shared
    attention = (kv * group, kv, 2 * half)
    config = PolicyConfig(
        kind=kind,
        sizes=Sizes(
            vlm=GemmaSize(widths[0], depth, 3, *attention),
            exp=GemmaSize(2 * widths[1], depth, 5, *attention),
            vis=VisionSize(vis[0] * vis[2], vis[1], vis[2], vis[3]),
            vocab=99,
            image=patches[0] * patches[1],
            patch=patches[1],
        ),
        horizon=lengths[0],
        token_length=lengths[1],
        max_action_dim=lengths[2],
        max_state_dim=lengths[3],
        cameras=tuple(cameras),
        state_dim=lengths[4],
        action_dim=lengths[4],
        min_period=0.01,
        time_alpha=2.0,
    )
    document = json.loads(json.dumps(config.to_json()))
    assert parse_config(document, kind) == config


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"type": "act"}, "is not π0.5, π0 or π0-FAST"),
        ({}, "is not π0.5, π0 or π0-FAST"),
        ([1], "JSON object"),
        ({"type": "pi05", "chunk_size": "fifty"}, "chunk_size"),
        ({"type": "pi05", "chunk_size": 0}, "chunk_size"),
        ({"type": "pi05", "min_period": "x"}, "min_period"),
        ({"type": "pi05", "paligemma_variant": "gemma_9b"}, "gemma_9b"),
        ({"type": "pi05", "sizes": {"vlm": [1, 2]}}, r"sizes\.vlm"),
        ({"type": "pi05", "sizes": {"vlm": [64, 3, 128, 8, 1, 16]}}, "agree"),
        ({"type": "pi05", "sizes": {"patch": 15}}, "patch 15"),
        ({"type": "pi05", "image_resolution": [224, 320]}, "image_resolution"),
        ({"type": "pi05", "input_features": [1]}, "input_features"),
        ({"type": "pi05", "output_features": {"action": {"shape": [2, 7]}}}, "action"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(write(tmp_path, document))


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["config", "weights"])
def test_reading_a_config_loads_no_heavy_dependency(name: str) -> None:
    """Imports are lazy: a node can read a config before torch is needed."""
    code = (
        f"import sys, pi05_ros.policy.{name}; "
        "print([m for m in ('torch', 'transformers', 'rclpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_packages_names() -> None:
    import pi05_ros.policy as policy

    assert policy.load_model.__module__ == "pi05_ros.policy.checkpoint"
    assert policy.read_config is read_config
    with pytest.raises(AttributeError, match="nothing"):
        _ = policy.nothing
