"""Stands in for CUDA graphs on a CPU: records operations, and replays them into the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi05_ros.policy.inference import WARM_UPS, Recorded

T = TypeVar("T")

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim"}
"""Operations whose result the host has to read before it can go on."""


class Tape(TorchDispatchMode):
    """What was asked of the device; asking for something that makes the host wait is an error."""

    def __init__(self, device: str | None = None) -> None:
        """`device` is where all of it must happen."""
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError("the length of a boolean selection is waited for")
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, out)):
            if self._device is not None:
                assert tensor.device.type == self._device, f"{name} on {tensor.device}"
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            anew = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(anew), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A `Recorder`: nothing but the tensors' contents can differ from replay to replay."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        for _ in range(WARM_UPS):
            run()
        self.recorded += 1
        with Tape() as tape:
            outputs = run()
        return Recorded(outputs, tape.replay)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
