"""Device and distributed set-up: one process, or several with Hugging Face accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pi05_lab.training.config import ConfigError, TrainConfig


class Processes:
    """The device of this process, and its synchronisation with the others.

    With `accelerate: true` the device and the number of processes are accelerate's: `accelerate
    launch`'s configuration or options, or torchrun's environment.

    Raises:
        ConfigError: accelerate is requested and not installed; an unknown or missing device.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._accelerator: Any = None
        self.rank, self.count = 0, 1
        if not config.accelerate:
            self.device = _device(config.device)
            return
        try:
            from accelerate import (  # type: ignore[import-untyped]
                Accelerator,
                DistributedDataParallelKwargs,
            )
        except ImportError:
            raise ConfigError(
                "accelerate: true needs the package accelerate: pip install 'pi05_ros[train]', or "
                "set it to false for one process"
            ) from None
        # A stage's losses do not reach all parameters.
        settings = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision="no", kwargs_handlers=[settings]
        )
        self.device = self._accelerator.device
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages the gradients over the processes."""
        if self._accelerator is None:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def backward(self, loss: torch.Tensor) -> None:
        if self._accelerator is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._accelerator.backward(loss)

    def release(self) -> None:
        """Release the wrapped modules: the next stage wraps again, with other parameters."""
        if self._accelerator is not None:
            self._accelerator.free_memory()

    def wait(self) -> None:
        """Wait for all processes."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is unknown; use auto, cuda or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} needs CUDA, which is not available; use auto or cpu")
    return device
