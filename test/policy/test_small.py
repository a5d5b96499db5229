"""The small checkpoint; faults: half a folder in the cache, noise or nothing for motion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pi05_ros.policy import small
from pi05_ros.policy.config import read_config
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.processors import STATE
from pi05_ros.types import Observation

HOME = np.array([*small.HOME_RAD, 0.5] * 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "checkpoint"
    small.create_small_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Policy:
    return Policy.from_pretrained(checkpoint, device="cpu", num_steps=5, seed=0)


def observation(seed: int, state: np.ndarray = HOME, instruction: str = "wave") -> Observation:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    pictures = blocks.repeat(20, axis=1).repeat(20, axis=2)
    return Observation(dict(zip(small.CAMERAS, pictures, strict=True)), state, instruction, 0.0)


def test_the_same_seed_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    """Fault: a demo that moves otherwise on every machine; seeds that change nothing."""
    small.create_small_checkpoint(tmp_path / "again")
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (checkpoint / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    small.create_small_checkpoint(tmp_path / "other", seed=1)
    weights = "model.safetensors"
    assert (checkpoint / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_it_says_that_it_is_untrained(checkpoint: Path, policy: Policy) -> None:
    """Fault: random motion taken for the policy's skill."""
    settings = json.loads((checkpoint / "pi05_ros.json").read_text())
    assert settings["trained"] is False
    assert policy.description.startswith("π0.5, 4.0 M parameters, float32")
    assert policy.description.endswith("untrained (random weights, seed 0)")


def test_size_and_config(checkpoint: Path) -> None:
    """Fault: sizes that config.json does not carry over."""
    assert read_config(checkpoint) == small.small_config()
    assert (checkpoint / "tokenizer.json").stat().st_size < 100_000


def test_any_short_instruction_fits(policy: Policy) -> None:
    """Fault: the state cut off behind an instruction of unknown words."""
    policy.infer(observation(0, instruction="x" * 70))
    assert policy.truncated_tokens == 0


def test_chunks_are_smooth_and_bounded(policy: Policy) -> None:
    """Fault: the noise left in the chunk, or joints sent to the end of their range."""
    half_range = np.array([*small.HALF_RANGE_RAD, 0.5] * 2)
    for seed in range(4):
        actions = policy.infer(observation(seed)).actions
        scaled = (actions - HOME) / half_range
        assert np.abs(scaled).max() < 2.5
        assert np.abs(np.diff(scaled, axis=0)).max() < 0.25


def test_motion_is_visible_and_follows_what_it_sees(policy: Policy) -> None:
    """Fault: arms that stand still, or that move the same whatever they see and are told."""
    base = policy.infer(observation(0)).actions
    assert np.abs(base - HOME).mean() > 0.05
    others = {
        "pictures": observation(1),
        "state": observation(0, state=HOME + 0.1),
        "instruction": observation(0, instruction="go home"),
    }
    for what, other in others.items():
        assert np.abs(policy.infer(other).actions - base).max() > 0.01, what


def test_statistics_have_home_in_the_middle() -> None:
    """Fault: a pose in the middle of the network's range that is not the arm's home."""
    stats = small.small_statistics()[STATE]
    np.testing.assert_allclose((stats["q01"] + stats["q99"]) / 2, HOME, atol=1e-12)
    assert (stats["q01"][[6, 13]] == 0).all() and (stats["q99"][[6, 13]] == 1).all()


def test_a_lost_race_uses_the_winners_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the loser's rename onto a folder that is there fails, or leaves its own behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "pi05_ros"

    def create(directory: Path) -> None:
        target = cache / f"small_aloha_untrained_{small._recipe_hash()}"
        target.mkdir()
        (target / "winner").touch()
        (directory / "loser").touch()

    monkeypatch.setattr(small, "create_small_checkpoint", create)
    path = small.small_checkpoint()
    assert (path / "winner").exists() and not (path / "loser").exists()
    assert list(cache.iterdir()) == [path]
    assert small.small_checkpoint() == path


def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an interrupted first run, whose remains every later run then fails on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def create(directory: Path) -> None:
        (directory / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(small, "create_small_checkpoint", create)
    with pytest.raises(KeyboardInterrupt):
        small.small_checkpoint()
    assert list((tmp_path / "pi05_ros").iterdir()) == []


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a bare FileExistsError on a robot's read-only account."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"needs a writable cache.*set XDG_CACHE_HOME"):
        small.small_checkpoint()


def test_a_shipped_checkpoint_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the untrained network used where a trained one is shipped."""
    monkeypatch.setattr(small, "SHIPPED", tmp_path)
    (tmp_path / "config.json").touch()
    assert small.small_checkpoint() == tmp_path
