"""Adapters; faults: matrices that learn whole, adapters that inference leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from squares_world import make_config, squares, stage  # type: ignore[import-not-found]

from pi05_lab.training.train import train
from pi05_ros.check import check
from pi05_ros.policy.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pi05_ros.policy.checkpoint import load_model
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import Observation

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base")
    train(make_config(output, dataset))
    return output / "checkpoint"


def fine_tune(output: Path, base: Path, dataset: Path, **lora: Any) -> Path:
    changes: dict[str, Any] = {
        "network": {"start": str(base)},
        "lora": LORA | lora,
        "stages": [stage(steps=6, lr=1e-2)],
    }
    checkpoint = train(make_config(output, dataset, **changes))
    assert checkpoint is not None
    return checkpoint


def actions(checkpoint: Path) -> np.ndarray:
    policy = Policy.from_pretrained(checkpoint, robot="generic", device="cpu", seed=0)
    image, _ = squares(np.random.default_rng(0))
    observation = Observation({"cam": image}, np.zeros(2), "touch the red cube", 0.0)
    return policy.infer(observation).actions


@pytest.mark.parametrize("parts", [["expert"], ["prefix"], ["expert", "prefix"]])
def test_adapters_load_alone_or_merged(
    tmp_path: Path, dataset: Path, base: Path, parts: list[str]
) -> None:
    """The same training saved in both forms gives the same actions, other ones than its start."""
    merged = fine_tune(tmp_path / "merged", base, dataset, parts=parts)
    alone = fine_tune(tmp_path / "alone", base, dataset, parts=parts, merge=False)
    np.testing.assert_allclose(actions(alone), actions(merged), atol=1e-5)
    assert np.abs(actions(alone) - actions(base)).max() > 1e-3
    assert not (alone / "model.safetensors").exists()
    size = (alone / ADAPTER_WEIGHTS).stat().st_size
    assert size < 0.25 * (merged / "model.safetensors").stat().st_size
    assert not check(alone, "generic").problems


def test_only_adapters_and_projections_learn(tmp_path: Path, dataset: Path, base: Path) -> None:
    merged = fine_tune(tmp_path, base, dataset)
    before, after = load_model(base), load_model(merged)
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = {name for (name, a), b in pairs if not torch.equal(a, b)}
    adapted = {n for n in moved if n.startswith("experts.action.layers.")}
    assert len(adapted) == 8  # four matrices of two layers
    assert {n.split(".")[0] for n in moved - adapted} <= {
        "action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out",
    }  # fmt: skip
    change = (
        dict(after.named_parameters())["experts.action.layers.0.qkv.weight"]
        - dict(before.named_parameters())["experts.action.layers.0.qkv.weight"]
    )
    assert torch.linalg.matrix_rank(change, atol=1e-5) <= LORA["rank"]


def test_adapters_resume(tmp_path: Path, dataset: Path, base: Path) -> None:
    whole = fine_tune(tmp_path / "whole", base, dataset, merge=False)
    changes: dict[str, Any] = {
        "network": {"start": str(base)},
        "lora": LORA | {"merge": False},
        "stages": [stage(steps=6, lr=1e-2)],
    }
    polls = iter([False, False, True])
    config = make_config(tmp_path / "stopped", dataset, **changes)
    assert train(config, stop=lambda: next(polls)) is None
    resumed = train(config, resume=True)
    assert resumed is not None
    mine, theirs = (load_file(folder / ADAPTER_WEIGHTS) for folder in (resumed, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_damaged_adapters_are_named(tmp_path: Path, dataset: Path, base: Path) -> None:
    alone = fine_tune(tmp_path, base, dataset, merge=False)
    tensors = load_file(alone / ADAPTER_WEIGHTS)
    first = next(name for name in tensors if "lora_A" in name)
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != first}, "lack their counterpart"),
        (tensors | {first: tensors[first][:, :-1]}, "have another shape than the matrix"),
        (tensors | {first: tensors[first] * torch.nan}, "not finite"),
        (tensors | {"base_model.model.head": torch.ones(2)}, "'head' does not fit the network"),
    ):
        save_file({k: v.contiguous() for k, v in wrong.items()}, alone / ADAPTER_WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            load_model(alone)
    (alone / ADAPTER_CONFIG).write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="is not LoRA with a base checkpoint"):
        load_model(alone)
