"""Peak memory of a training step of the full π0.5, by configuration; needs no GPU.

PyTorch's memory tracker (`torch.distributed._tools.mem_tracker`) follows every storage through two
steps on fake tensors, which have sizes and no data. Fused attention and the fused AdamW stand in
for CUDA's, so temporaries inside kernels, the CUDA context (about 0.5 GiB) and the allocator's
fragmentation are not in the figures.

    python benchmarks/training_memory.py [--batch 32]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from pi05_lab.training.config import TrainConfig, parse_config
from pi05_lab.training.data import Batch
from pi05_lab.training.lora import add_adapters
from pi05_lab.training.losses import TrainModule, checkpoint_layers, choose_parameters
from pi05_lab.training.optim import AveragedWeights, make_optimizers
from pi05_ros.policy import model as model_module
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.model import Pi0, repeat_heads

GIB = 2**30
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "everything, averages on the GPU": {},
    "everything, averages on the CPU": {"ema_device": "cpu"},
    "everything, averages on the CPU, moments in bfloat16": {
        "ema_device": "cpu", "optimizer_precision": "bfloat16"},
    "everything, no averages": {"stage": {"ema": 0.0}},
    "everything, no averages, moments in bfloat16": {
        "optimizer_precision": "bfloat16", "stage": {"ema": 0.0}},
    "expert only": {"train_expert_only": True},
    "LoRA rank 16: expert": {"lora": {"rank": 16}},
    "LoRA rank 16: expert and language model": {
        "lora": {"rank": 16, "parts": ["expert", "prefix"]}},
}  # fmt: skip


class Result(NamedTuple):
    """GiB at the peak of the second step, and what stays between two steps."""

    peak: float
    resident: float


class Tracker(MemTracker):
    """Without figures by module, which take minutes, and without its hooks on gradients.

    Those fail for frozen parameters; gradients are counted with the activations.
    """

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, -1) < snapshot["Total"]:
                self._peak_mem[device] = snapshot["Total"]
                self._peak_mem_snap[device] = dict(snapshot)

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        counted: tuple[int, int] = super()._track_module_params_and_buffers(module, False)
        return counted


def make_config(changes: Mapping[str, Any]) -> TrainConfig:
    """A fine-tuning with a configuration's changes."""
    changes = dict(changes)
    stage = {"name": "fine-tune", "losses": {"flow": 1.0}, "steps": 2, **changes.pop("stage", {})}
    document = {"output": "-", "data": {"datasets": [{"root": "-"}]}, "stages": [stage]}
    return parse_config(document | {"gradient_checkpointing": True} | changes)


def make_batch(config: PolicyConfig, size: int) -> Batch:
    """A batch of three cameras and 200 tokens, without content."""
    shape = (size, config.horizon, config.max_action_dim)
    side = config.image_size
    return Batch(
        images=torch.zeros(size, 3, 3, side, side),
        image_masks=torch.ones(size, 3, dtype=torch.bool),
        tokens=torch.zeros(size, config.token_length, dtype=torch.int64),
        token_masks=torch.ones(size, config.token_length, dtype=torch.bool),
        actions=torch.zeros(shape),
        states=torch.zeros(size, config.max_state_dim),
        noise=torch.zeros(shape),
        times=torch.zeros(size),
        delays=torch.zeros(size, dtype=torch.int64),
        targets={},
    )


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """What CUDA runs: no matrix of weights is kept."""
    group = query.shape[1] // key.shape[1]
    key, value = (repeat_heads(x, group) if group > 1 else x for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def encode_prefix(
    network: Pi0, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
) -> Any:
    """`Pi0.encode_prefix` without its decisions by value, which fake tensors do not have."""
    features = network.embed_images(images)
    return network.prefill(features, image_masks, tokens, token_masks)


def measure(changes: Mapping[str, Any], size: int) -> Result:
    """Run two steps on fake tensors."""
    config = make_config(changes)
    stage, policy = config.stages[0], PolicyConfig(state_dim=14, action_dim=14)
    tracker = Tracker()
    with torch.device("meta"):
        network = Pi0(policy)
        if config.lora is not None:
            add_adapters(network, config.lora)
    checkpoint_layers(network)
    with FakeTensorMode():
        for part in network.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(parameter.shape))
        network.encode_prefix = partial(encode_prefix, network)  # type: ignore[method-assign]
        module = TrainModule.__new__(TrainModule)
        nn.Module.__init__(module)
        module.network, module.auxiliary, module.padded = network, None, True
        parameters = choose_parameters(module, stage, config)
        average = AveragedWeights(parameters, 0.0 if config.ema_device else stage.ema)
        (optimizer,) = make_optimizers(parameters, stage, config.optimizer_precision)
        for group in optimizer.param_groups:
            group["fused"] = isinstance(optimizer, torch.optim.AdamW)
        batch = make_batch(policy, size)
        tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        tracker.track_external(module, optimizer, *tensors, *average.shadow.values())
        with tracker:
            for step in range(2):
                tracker.reset_mod_stats()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = module(batch, stage.losses, stage.insulate)[0]
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), stage.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                average.update(step)
                del loss
            snapshots = [tracker.get_tracker_snapshot(kind) for kind in ("peak", "current")]
    peak, current = (
        sum(device["Total"] for device in snapshot.values()) / GIB for snapshot in snapshots
    )
    return Result(peak, current)


def main() -> None:
    """Print a table of all configurations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    sizes = parser.parse_args().batch
    model_module._unfused_attention = fused_attention
    print(f"| configuration | between steps | {' | '.join(f'batch {n}' for n in sizes)} |")
    print(f"|---|---|{'---|' * len(sizes)}")
    for name, changes in CONFIGURATIONS.items():
        results = [measure(changes, size) for size in sizes]
        peaks = " | ".join(f"{result.peak:.1f}" for result in results)
        print(f"| {name} | {results[0].resident:.1f} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
