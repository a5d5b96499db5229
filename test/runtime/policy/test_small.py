"""The shipped checkpoint; faults: an incomplete folder, weights that do not belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_policy.tokenizer import small_config
from untrained import HOME_RAD  # type: ignore[import-not-found]

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.rendering import CameraRenderer
from pi05_ros.policy import checkpoint as hub
from pi05_ros.policy.checkpoint import CAMERAS, SHIPPED, SMALL
from pi05_ros.policy.config import read_config
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import Observation

HOME = np.array([*HOME_RAD, 0.14] * 2)
LARGEST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_pretrained(SMALL, device="cpu", seed=0)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """What the cameras see with the arms at home."""
    sim = SimulatedAloha()
    sim.reset(3)
    renderer = CameraRenderer(sim.model, 112, 84)
    drawn = {camera: renderer.render(sim.data, camera) for camera in CAMERAS}
    renderer.close()
    return drawn


def test_the_folder_is_small_and_complete() -> None:
    """Fault: a recipe, log or card that was left behind, or a float32 copy of the weights."""
    names = {path.name for path in SHIPPED.iterdir()}
    recipe = {f"{name}_{n}" for name in ("train_config", "training_log") for n in (1, 2)}
    assert recipe <= {name.partition(".")[0] for name in names}
    assert {"README.md", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= LARGEST_BYTES
    assert read_config(SHIPPED) == small_config()


def test_its_description(policy: Policy) -> None:
    settings = json.loads((SHIPPED / "pi05_ros.json").read_text())
    assert settings["trained"] is True
    assert policy.description.startswith("π0.5, 4.0 M parameters, float32, trained")


def test_any_short_instruction_fits(policy: Policy, images: dict[str, np.ndarray]) -> None:
    """Fault: the state cut off behind an instruction of unknown words."""
    policy.infer(Observation(images, HOME, "x" * 70, 0.0))
    assert policy.truncated_tokens == 0


def test_chunks_start_at_the_arms_and_follow_the_instruction(
    policy: Policy, images: dict[str, np.ndarray]
) -> None:
    """Fault: statistics of other data, which send the arms elsewhere at the first step."""
    left, right = (
        policy.infer(Observation(images, HOME, f"wave with the {side} arm", 0.0)).actions
        for side in ("left", "right")
    )
    for actions in (left, right):
        assert np.abs(actions[0] - HOME).max() < 0.3
    travel = np.ptp(left, axis=0), np.ptp(right, axis=0)
    assert travel[0][:6].max() > 2 * travel[1][:6].max()
    assert travel[1][7:13].max() > 2 * travel[0][7:13].max()


def test_an_installation_without_the_small_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SHIPPED", tmp_path)
    with pytest.raises(CheckpointError, match="not whole"):
        hub.checkpoint_folder(SMALL)
