"""CUDA graph capture on a CPU: logs the operations, and replays them into the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi05_ros.policy.inference import WARM_UPS, Captured

T = TypeVar("T")

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal",
                 "unique_dim"}  # fmt: skip
"""Operations whose result the host reads before it continues."""


class OperationLog(TorchDispatchMode):
    """The operations in order; one that a CUDA graph cannot hold is an error."""

    def __init__(self, device: str | None = None) -> None:
        """With `device`, every tensor must be there."""
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCHRONISING, f"{name} synchronises with the device"
        if name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError("a boolean selection synchronises with the device")
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, out)):
            if self._device is not None:
                assert tensor.device.type == self._device, f"{name} on {tensor.device}"
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class SimulatedCapture:
    """A `Capture`: only the tensors' contents can differ from replay to replay."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], T]) -> Captured[T]:
        for _ in range(WARM_UPS):
            run()
        self.count += 1
        with OperationLog() as log:
            outputs = run()
        return Captured(outputs, log.replay)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
