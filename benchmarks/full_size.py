"""π0.5 in full size on the CPU: load, one chunk, time and peak memory.

    python benchmarks/full_size.py [--directory DIR] [--json FILE]

Writes a checkpoint of seeded weights to DIR (6.7 GB, kept when DIR is given) in LeRobot's names,
then loads it in bfloat16 in a process of its own and samples one chunk of 50 steps from three
pictures and a prompt of 60 tokens. Peak memory is the kernel's VmHWM.

The recipe, so that others can make the same file: every tensor of LeRobot's π0.5 without the two
language heads, in the order of `safetensors_names`, bfloat16. Tensor `name` is drawn with
torch.Generator().manual_seed(crc32(name)), normal with mean 0 and standard deviation
1 / sqrt(values per output row), 1 / sqrt(width) for the embeddings; biases are 0, SigLIP's layer
norm weights 1, Gemma's RMS norm weights 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch

from pi05_ros.policy.checkpoint import key_map, load_model
from pi05_ros.policy.config import CONFIG_FILE, PolicyConfig
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.weights import SINGLE_FILE

TOKENS = 60
LIMIT = 1.15
"""Allowed peak while loading, as a multiple of the parameters' bytes."""


def safetensors_names(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """LeRobot's name of every tensor → its shape."""
    with torch.device("meta"):
        model = Pi0(config)
    return {
        name: shape
        for source in key_map(model).values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor by the recipe above."""
    if len(shape) == 1:
        is_layer_norm = name.endswith(".weight") and "layer_norm" in name.rsplit(".", 2)[-2]
        ones = name.endswith(".weight") and (is_layer_norm or "vision_model.post_layernorm" in name)
        return (torch.ones if ones else torch.zeros)(shape, dtype=torch.bfloat16)
    is_table = "embed" in name and "patch" not in name
    fan_in = shape[1] if is_table else math.prod(shape[1:])
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(shape, dtype=torch.bfloat16)
    return values.normal_(0.0, fan_in**-0.5, generator=generator)


def write_checkpoint(directory: Path, config: PolicyConfig) -> None:
    """Write config.json and the weights, one tensor in memory at a time."""
    names = safetensors_names(config)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in names.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = directory / (SINGLE_FILE + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in names.items():
            file.write(draw(name, shape).view(torch.uint8).numpy().data)
    partial.replace(directory / SINGLE_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(config.to_json()), encoding="utf-8")


def peak_bytes() -> int:
    """The process's largest resident memory so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this measurement needs Linux")


def measure(directory: Path) -> dict[str, float | int | bool]:
    """Load and sample in this process."""
    start = time.perf_counter()
    model = load_model(directory, dtype=torch.bfloat16)
    load_s = time.perf_counter() - start
    load_peak = peak_bytes()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    generator = torch.Generator().manual_seed(0)
    side = config.image_size
    images = torch.rand((1, 3, 3, side, side), generator=generator) * 2 - 1
    tokens = torch.randint(3, 256_000, (1, TOKENS), generator=generator)
    noise = torch.randn((1, config.horizon, config.max_action_dim), generator=generator)
    start = time.perf_counter()
    chunk = model.sample_actions(
        images,
        torch.ones((1, 3), dtype=torch.bool),
        tokens,
        torch.ones((1, TOKENS), dtype=torch.bool),
        noise=noise,
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": weights,
        "load_s": load_s,
        "load_peak_bytes": load_peak,
        "load_peak_ratio": load_peak / weights,
        "sample_s": time.perf_counter() - start,
        "sample_peak_bytes": peak_bytes(),
        "finite": bool(torch.isfinite(chunk).all()),
        "rms": float(chunk.square().mean().sqrt()),
        "threads": torch.get_num_threads(),
    }


def run(directory: Path) -> dict[str, float | int | bool]:
    """Write the checkpoint where it isn't yet, and measure it in a fresh process."""
    if not (directory / SINGLE_FILE).is_file():
        start = time.perf_counter()
        write_checkpoint(directory, PolicyConfig(state_dim=14, action_dim=14))
        print(f"weights written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    command = [sys.executable, __file__, "--measure", str(directory)]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if finished.returncode:
        raise SystemExit(finished.stderr)
    result: dict[str, float | int | bool] = json.loads(finished.stdout)
    return result


def main() -> int:
    """Exit code 1 when loading needs more memory than it may, or the chunk is not finite."""
    parser = argparse.ArgumentParser(description="π0.5 in full size on the CPU")
    parser.add_argument("--directory", type=Path, help="where the weights go and stay")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    if options.directory:
        options.directory.mkdir(parents=True, exist_ok=True)
        result = run(options.directory)
    else:
        with tempfile.TemporaryDirectory(prefix="pi05_full_size_") as directory:
            result = run(Path(directory))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    gib = 2**30
    print(f"parameters        {result['parameters'] / 1e9:.3f} B")
    print(f"weights           {result['weights_bytes'] / gib:.2f} GiB in bfloat16")
    print(f"load              {result['load_s']:.1f} s, {result['threads']} threads")
    print(
        f"peak after load   {result['load_peak_bytes'] / gib:.2f} GiB, "
        f"{result['load_peak_ratio']:.3f} × the weights (limit {LIMIT})"
    )
    print(f"one chunk         {result['sample_s']:.1f} s, rms {result['rms']:.3f}")
    print(f"peak in all       {result['sample_peak_bytes'] / gib:.2f} GiB")
    return 0 if result["finite"] and result["load_peak_ratio"] < LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
