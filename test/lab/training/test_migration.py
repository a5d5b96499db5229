"""π0 → π0.5; faults: a random part that no row names, a matrix that is cut to fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pi05_lab.training.config import ConfigError
from pi05_lab.training.migration import Row, migrate, table
from pi05_ros.policy.checkpoint import load_model, save_model
from pi05_ros.policy.model import Pi0, sinusoidal_embedding

PI0 = Path(__file__).parents[2] / "data" / "pi0_tiny_f32"


@pytest.fixture(scope="module")
def migrated() -> tuple[Pi0, list[Row]]:
    torch.manual_seed(0)
    return migrate(PI0)


def test_every_parameter_is_in_a_row(migrated: tuple[Pi0, list[Row]]) -> None:
    """Taken and fresh are all of π0.5; taken and dropped are all of π0."""
    network, rows = migrated
    whats = ("taken", "fresh", "dropped")
    count = {what: sum(r.parameters for r in rows if r.what == what) for what in whats}
    assert count["taken"] + count["fresh"] == sum(p.numel() for p in network.parameters())
    assert count["taken"] + count["dropped"] == sum(p.numel() for p in load_model(PI0).parameters())
    assert {(r.part, r.what) for r in rows if r.what != "taken"} == {
        ("experts.action", "dropped"),
        ("experts.action.modulation", "fresh"),
        ("time_mlp_in", "fresh"),
        ("time_mlp_out", "fresh"),
        ("state_proj", "dropped"),
        ("action_time_mlp_in", "dropped"),
        ("action_time_mlp_out", "dropped"),
    }
    assert all(row.why for row in rows if row.what != "taken")
    for row in rows:
        assert f"| {row.part} | {row.what} | {row.parameters:,} |" in table(rows)


def test_only_what_a_row_names_is_random(migrated: tuple[Pi0, list[Row]]) -> None:
    torch.manual_seed(1)
    again, _ = migrate(PI0)
    pairs = zip(migrated[0].named_parameters(), again.parameters(), strict=True)
    differs = {name.split(".")[0] for (name, a), b in pairs if not torch.equal(a, b)}
    assert differs == {"time_mlp_in", "time_mlp_out"}


def test_the_prefix_is_the_same_and_the_expert_begins_as_the_identity(
    migrated: tuple[Pi0, list[Row]],
) -> None:
    network, before = migrated[0].eval(), load_model(PI0)
    config = network.config
    generator = torch.Generator().manual_seed(0)
    side = config.image_size
    inputs: dict[str, Any] = {
        "images": torch.rand(1, len(config.cameras), 3, side, side, generator=generator),
        "image_masks": torch.ones(1, len(config.cameras), dtype=torch.bool),
        "tokens": torch.randint(1, config.sizes.vocab, (1, 12), generator=generator),
        "token_masks": torch.ones(1, 12, dtype=torch.bool),
    }
    mine, theirs = network.encode_prefix(**inputs), before.encode_prefix(**inputs)
    for a, b in zip(mine.cache, theirs.cache, strict=True):
        torch.testing.assert_close(a, b)
    noisy = torch.randn(1, config.horizon, config.max_action_dim, generator=generator)
    features = network.time_features(torch.tensor([0.3]))
    assert not features.any()
    velocity = network.denoise_step(mine, noisy, features)
    hidden = network.action_in_proj(noisy)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    expected = network.action_out_proj(normed)
    torch.testing.assert_close(velocity, expected)


def test_a_cut_action_time_mlp_is_no_time_mlp() -> None:
    """What is often said: keep the first columns of `action_time_mlp_in` as `time_mlp_in`.

    Those columns multiply the action; π0's time goes through the others.
    """
    network = load_model(PI0)
    width = network.config.sizes.exp.width
    weight = network.action_time_mlp_in.weight.detach()
    assert weight.shape == (width, 2 * width)
    times = torch.tensor([0.1, 0.9])
    waves = sinusoidal_embedding(times, width, 0.004, 4.0)
    actions = torch.zeros(2, width)
    mixed = torch.nn.functional.linear(torch.cat((actions, waves), dim=1), weight)
    torch.testing.assert_close(mixed, waves @ weight[:, width:].T)
    cut = waves @ weight[:, :width].T
    assert float((cut - mixed).norm() / mixed.norm()) > 0.5


def test_what_is_pi05_already_is_refused(tmp_path: Path, migrated: tuple[Pi0, list[Row]]) -> None:
    save_model(migrated[0], tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.time_mlp_in.weight"].any()
    with pytest.raises(ConfigError, match=r"is π0\.5 already"):
        migrate(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.adaptive and np.isfinite(loaded.time_mlp_in.weight.detach().sum().item())
