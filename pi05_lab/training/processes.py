"""Device and distributed set-up: one process, or several with Hugging Face accelerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi05_lab.training.config import ConfigError, TrainConfig


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """The device of this process, and its synchronisation with the others. Defaults: no others."""

    device: torch.device
    rank: int = 0
    """The process with rank 0 writes files and prints."""
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes the module whose backward pass averages the gradients over the processes."""
    backward: Callable[[Tensor], object] = Tensor.backward
    release: Callable[[], object] = _nothing
    """Releases the wrapped modules: the next stage wraps again, with other parameters."""
    wait: Callable[[], object] = _nothing
    """Waits for all processes."""
    close: Callable[[], object] = _nothing

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def open_processes(config: TrainConfig) -> Processes:
    """Set up this process.

    With `accelerate: true` the device and the number of processes are accelerate's: `accelerate
    launch`'s configuration or options, or torchrun's environment.

    Raises:
        ConfigError: accelerate is requested and not installed; an unknown or missing device.
    """
    if not config.accelerate:
        return Processes(_device(config.device))
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
    accelerator = Accelerator(
        cpu=config.device == "cpu", mixed_precision="no", kwargs_handlers=[settings]
    )
    return Processes(
        device=accelerator.device,
        rank=accelerator.process_index,
        wrap=accelerator.prepare_model,
        backward=accelerator.backward,
        release=accelerator.free_memory,
        wait=accelerator.wait_for_everyone,
        close=accelerator.end_training,
    )


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is unknown; use auto, cuda or cpu") from None
    if device.type == "cuda" and not available:
        raise ConfigError(f"device: {name!r} needs CUDA, which is not available; use auto or cpu")
    return device
