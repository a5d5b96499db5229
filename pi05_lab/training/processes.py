"""Device and distributed set-up: one process, or several as Hugging Face accelerate starts them.

accelerate's launcher and state choose devices and start the process group; PyTorch's own
DistributedDataParallel and FSDP2 (`fully_shard`) run the module, on GPUs and on CPUs alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_ros.policy.model import GemmaLayer, VisionLayer

_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_LAYER_METHODS = ("before_attention", "after_attention", "key_value")


class Processes:
    """The device of this process, and its synchronisation with the others."""

    def __init__(
        self, device: torch.device, rank: int = 0, count: int = 1, sharded: bool = False
    ) -> None:
        self.device = device
        self.rank = rank
        """The process with rank 0 writes files and prints."""
        self.count = count
        self.sharded = sharded
        """Whether weights, gradients and optimiser states are divided among the processes."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, module: nn.Module) -> None:
        """Divide a module's parameters among the processes, if the configuration says so."""
        if not self.sharded:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for part in module.modules():
            if isinstance(part, VisionLayer):
                fully_shard(part)
            elif isinstance(part, GemmaLayer):
                fully_shard(part)
                for method in _LAYER_METHODS:
                    register_fsdp_forward_method(part, method)
        fully_shard(module)
        register_fsdp_forward_method(module, "sample")

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages the gradients over the processes.

        Each stage wraps the module again, because the parameters that learn differ.
        """
        if self.count == 1 or self.sharded:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # A stage's losses do not reach all parameters.
        return nn.parallel.DistributedDataParallel(module, ids, find_unused_parameters=True)

    def accumulating(self, wrapped: Any, last: bool) -> Any:
        """A context for one of a step's passes; only the last one averages the gradients."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)
        elif self.count > 1 and not last:
            return wrapped.no_sync()
        return nullcontext()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, the same in all of them."""
        return bool(self.sum({"flag": float(flag)})["flag"])

    def sum(self, figures: Mapping[str, float | Tensor]) -> dict[str, float]:
        """The sums over the processes, which have the same names."""
        values = [torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in figures.values()]
        if self.count > 1 and values:
            # NCCL has no operations on the CPU, and some devices no float64
            together = torch.stack(values).to(self.device, torch.float32)
            dist.all_reduce(together)
            values = list(together.cpu().double())
        return {name: float(value) for name, value in zip(figures, values, strict=True)}

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.count > 1:
            dist.destroy_process_group()


def open_processes(config: TrainConfig) -> Processes:
    """Set up this process.

    With `accelerate: true` devices and the number of processes are accelerate's: `accelerate
    launch`'s configuration or options, or torchrun's environment. With its FSDP, version 2, the
    network is sharded.

    Raises:
        ConfigError: accelerate is requested and not installed, or configured for what this training
            does not do; an unknown or missing device.
    """
    if not config.accelerate:
        return Processes(_device(config.device))
    try:
        from accelerate import PartialState  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(
            "accelerate: true needs the package accelerate: pip install 'pi05_ros[train]', or "
            "set it to false for one process"
        ) from None
    sharded = _is_set("ACCELERATE_USE_FSDP")
    _check_environment(config, sharded)
    state = PartialState(cpu=config.device == "cpu")
    count = state.num_processes
    if count == 1 and sharded and not dist.is_initialized():
        raise ConfigError("accelerate: FSDP needs at least 2 processes: set num_processes")
    for stage in config.stages:
        parts = count * stage.accumulate
        if stage.batch % parts:
            raise ConfigError(
                f"stage {stage.name!r}: batch {stage.batch} cannot be divided among {count} "
                f"processes and accumulate {stage.accumulate}; give a multiple of {parts}"
            )
    return Processes(state.device, state.process_index, count, sharded)


def _check_environment(config: TrainConfig, sharded: bool) -> None:
    """Raise ConfigError where accelerate is configured for something else than this training."""
    for variable, name in _REFUSED.items():
        if _is_set(variable):
            raise ConfigError(
                f"accelerate is configured for {name}, which this training does not use: choose "
                "multi-GPU, or FSDP version 2"
            )
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) > 1:
        raise ConfigError(
            "accelerate has gradient_accumulation_steps; set accumulate in the stages instead"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", {"bfloat16": "bf16"}.get(config.precision)):
        raise ConfigError(
            f"accelerate has mixed_precision {precision}; set it to no: precision "
            f"{config.precision} of the training's file applies"
        )
    if not sharded:
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"accelerate has FSDP version {version}: set fsdp_version: 2")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("accelerate has fsdp_offload_params: true, which is not supported")
    if config.ema_device:
        raise ConfigError("ema_device: cpu is not for a sharded network; leave it out")
    for stage in config.stages:
        if stage.optimizer == "muon":
            raise ConfigError(
                f"stage {stage.name!r}: muon needs whole matrices, FSDP shards them: use adamw"
            )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


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
