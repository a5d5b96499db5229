"""Tensors from safetensors files; faults: a missed NaN, memory that is not given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pi05_ros.policy.weights import CheckpointError, is_finite, read_tensor, tensor_index


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_value_is_read(stored: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"a": (7, 501), "b": (3,), "c": (4096,), "empty": (0, 4)}
    tensors = {name: torch.randn(shape).to(stored) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    index = tensor_index(tmp_path)
    for name, tensor in tensors.items():
        assert index[name].shape == tensor.shape
        assert torch.equal(read_tensor(index[name]), tensor), name
        assert is_finite(read_tensor(index[name]))


@pytest.mark.parametrize("place", [0, 249, 999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_values_are_found(place: int, value: float, dtype: torch.dtype) -> None:
    tensor = torch.full((1000,), 3e38, dtype=dtype)
    assert is_finite(tensor), "a sum that overflows is no fault of the values"
    tensor[place] = value
    assert not is_finite(tensor)


def test_the_file_is_unmapped_after_each_tensor(tmp_path: Path) -> None:
    """Fault: the weights a second time in memory, as mapped pages."""
    save_file({"a": torch.ones(16 * 2**20)}, tmp_path / "model.safetensors")
    info = tensor_index(tmp_path)["a"]
    assert torch.empty(info.shape).copy_(read_tensor(info)).sum() == 16 * 2**20
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    info = tensor_index(tmp_path)["a"]
    info.file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_tensor(info)
