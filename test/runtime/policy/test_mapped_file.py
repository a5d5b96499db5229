"""Copying from the mapped file; faults: a block lost or doubled, memory that is not given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pi05_ros.policy import weights as mapped_file
from pi05_ros.policy.weights import CheckpointError, MappedFile, tensor_index


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are no multiple of a page or of a tensor."""
    monkeypatch.setattr(mapped_file, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_value_arrives(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(7, 501).to(stored),
        "b": torch.randn(3).to(stored),
        "c": torch.randn(4096).to(stored),
        "empty": torch.zeros(0, 4).to(stored),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    index = tensor_index(tmp_path)
    with MappedFile(tmp_path / "model.safetensors") as file:
        for name, tensor in tensors.items():
            target = torch.empty(tensor.shape, dtype=wanted)
            assert file.copy_to(target, index[name])
            assert torch.equal(target, tensor.to(wanted)), name


@pytest.mark.parametrize("place", [0, 249, 250, 999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_anywhere(place: int, value: float, tmp_path: Path) -> None:
    tensor = torch.ones(1000)
    tensor[place] = value
    save_file({"a": tensor, "huge": torch.full((1000,), 3e38)}, tmp_path / "model.safetensors")
    index = tensor_index(tmp_path)
    with MappedFile(tmp_path / "model.safetensors") as file:
        assert not file.is_finite(index["a"])
        assert not file.copy_to(torch.empty(1000), index["a"])
        assert file.is_finite(index["huge"]), "a sum that overflows is no fault of the values"


def test_a_value_too_large_for_the_target_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.full((5,), 1e300, dtype=torch.float64)}, tmp_path / "model.safetensors")
    index = tensor_index(tmp_path)
    with MappedFile(tmp_path / "model.safetensors") as file:
        assert file.is_finite(index["a"])
        assert not file.copy_to(torch.empty(5), index["a"])


def test_pages_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the weights a second time in memory, as mapped pages."""
    monkeypatch.setattr(mapped_file, "BLOCK_BYTES", 2**20)
    count = 16 * 2**20
    save_file({"a": torch.ones(count)}, tmp_path / "model.safetensors")
    index = tensor_index(tmp_path)

    def mapped_bytes() -> int:
        lines = Path("/proc/self/smaps").read_text().split("model.safetensors")[1].splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Rss")).split()[1])

    with MappedFile(tmp_path / "model.safetensors") as file:
        assert file.copy_to(torch.empty(count), index["a"])
        assert mapped_bytes() < 4 * 2**20


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        MappedFile(tmp_path / "model.safetensors")
