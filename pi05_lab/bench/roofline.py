"""The least time of a chunk: each stage's arithmetic and memory traffic, and a device's peaks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pi05_ros.policy.config import GemmaSize, PolicyConfig


@dataclass(frozen=True)
class Cost:
    """Of one stage."""

    flop: float
    bytes: float
    """Weights and, while denoising, the prefix's keys and values, each read once per pass."""


@dataclass(frozen=True)
class Peaks:
    """A device's dense peak rates."""

    name: str
    flop_per_s: float
    bytes_per_s: float
    source: str

    def __str__(self) -> str:
        rates = f"{self.flop_per_s * 1e-12:.3g} TFLOP/s, {self.bytes_per_s * 1e-9:.4g} GB/s"
        return f"{self.name}: {rates} ({self.source})"

    def floor_s(self, cost: Cost) -> float:
        """The least time: arithmetic or traffic, whichever is longer."""
        return max(cost.flop / self.flop_per_s, cost.bytes / self.bytes_per_s)


DATA_SHEETS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "RTX 5090": (209e12, 1.79e12),
    "RTX 4090": (165e12, 1.01e12),
}
"""Part of the device's name → bfloat16 FLOP/s without sparsity and byte/s, from NVIDIA's sheets."""


def stage_costs(
    config: PolicyConfig, cameras: int, tokens: int, num_steps: int, bytes_per_value: int
) -> dict[str, Cost]:
    """vision, prefix and denoise of one chunk, without padding."""
    sizes = config.sizes
    vis, vlm, exp = sizes.vis, sizes.vlm, sizes.exp
    per_image = sizes.image_tokens
    layer = 4 * vis.width**2 + 2 * vis.width * vis.mlp_dim
    weights = vis.depth * layer + 3 * sizes.patch**2 * vis.width + vis.width * vlm.width
    attention = 4 * per_image**2 * vis.width * vis.depth
    vision = Cost(cameras * (2 * per_image * weights + attention), weights * bytes_per_value)
    length = cameras * per_image + tokens
    # of the last layer, only keys and values
    layers, last = vlm.depth - 1, 2 * vlm.kv_heads * vlm.head_dim * vlm.width
    weights = layers * _layer_weights(vlm) + last
    attention = 4 * length**2 * vlm.heads * vlm.head_dim * layers
    prefix = Cost(2 * length * weights + attention, weights * bytes_per_value)
    rows = config.horizon + (config.kind == "pi0")
    weights = exp.depth * _layer_weights(exp)
    attention = 4 * rows * (length + rows) * exp.heads * exp.head_dim * exp.depth
    cache = 2 * length * exp.kv_heads * exp.head_dim * exp.depth
    step = Cost(2 * rows * weights + attention, (weights + cache) * bytes_per_value)
    denoise = Cost(num_steps * step.flop, num_steps * step.bytes)
    return {"vision": vision, "prefix": prefix, "denoise": denoise}


def _layer_weights(size: GemmaSize) -> int:
    query, key_value = size.heads * size.head_dim, 2 * size.kv_heads * size.head_dim
    return size.width * (2 * query + key_value + 3 * size.mlp_dim)


def peaks_of(device: torch.device, dtype: torch.dtype) -> Peaks:
    """From the data sheet where there is one for bfloat16, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for part, (flop_per_s, bytes_per_s) in DATA_SHEETS.items():
        if part in name and dtype == torch.bfloat16:
            return Peaks(name, flop_per_s, bytes_per_s, "data sheet")
    return _measured(name, device, dtype)


def _measured(name: str, device: torch.device, dtype: torch.dtype) -> Peaks:
    """From a large matrix product, and a copy larger than any cache."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn((side, side), device=device).to(dtype)
    flop_per_s = 2 * side**3 / _fastest_s(lambda: a @ a, device)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    bytes_per_s = 2 * source.nbytes / _fastest_s(lambda: target.copy_(source), device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Peaks(name, flop_per_s, bytes_per_s, f"measured{threads}")


def _fastest_s(run: Callable[[], object], device: torch.device) -> float:
    best_s = float("inf")
    for _ in range(8):
        begin_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return best_s
