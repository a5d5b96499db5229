"""Small π0.5 and π0 networks, and the numbers that LeRobot computed with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from untrained import create_small_checkpoint  # type: ignore[import-not-found]

from pi05_ros.policy.checkpoint import load_model
from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize, parse_config
from pi05_ros.policy.model import Pi0

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="session", params=["pi05", "pi0"])
def golden(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One kind's loaded network, inputs and expected outputs."""
    kind = request.param
    directory = DATA / f"{kind}_tiny_f32"
    model = load_model(directory)
    inputs = load_file(DATA / "pi05_tiny_f32" / "inputs.safetensors")
    cameras = model.config.cameras
    return SimpleNamespace(
        kind=kind,
        directory=directory,
        model=model,
        prefix={
            "images": torch.stack([inputs[f"image.{name}"] for name in cameras], dim=1),
            "image_masks": torch.stack([inputs[f"img_mask.{name}"] for name in cameras], dim=1),
            "tokens": inputs["tokens"],
            "token_masks": inputs["masks"],
        },
        state=inputs["state"] if kind == "pi0" else None,
        inputs=inputs,
        outputs=load_file(directory / "outputs.safetensors"),
    )


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small checkpoint, to be read or copied."""
    path = tmp_path_factory.mktemp("small") / "checkpoint"
    create_small_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def small_sizes() -> Sizes:
    """Experts of different widths, another image and patch size: none of π0.5's proportions."""
    return Sizes(
        vlm=GemmaSize(48, 2, 64, 4, 1, 64),
        exp=GemmaSize(32, 2, 48, 4, 1, 64),
        vis=VisionSize(24, 1, 2, 32),
        vocab=300,
        image=112,
        patch=16,
    )


@pytest.fixture(params=["pi05", "pi0"])
def small(request: pytest.FixtureRequest, small_sizes: Sizes) -> Pi0:
    """A freshly initialised small network."""
    document = {
        "chunk_size": 6,
        "max_action_dim": 8,
        "max_state_dim": 8,
        "tokenizer_max_length": 12,
        "image_resolution": [112, 112],
    }
    default = parse_config(document, request.param)
    torch.manual_seed(0)
    return Pi0(PolicyConfig(**(vars(default) | {"sizes": small_sizes})))
