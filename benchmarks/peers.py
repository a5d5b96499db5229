"""One chunk of LeRobot's π0.5 and of ours: same weights, same inputs, turn by turn.

    python benchmarks/full_size.py --directory DIR      # writes seeded weights in LeRobot's names
    python benchmarks/peers.py DIR [--device cuda] [--dtype bfloat16] [--runs 20] [--rounds 2]

Needs an environment with both packages; benchmarks/peers.md says which. Each measurement is a
process of its own that loads, warms up and times `sample_actions`: pictures already prepared,
tokens padded to 200, 10 steps. Ours runs as the node does (`execution`), LeRobot's as its policy
does, and once more with its `compile_model`, where asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTH = 200


def inputs(tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Seeded; three pictures, `tokens` tokens before the padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256_000, (1, LENGTH), generator=generator)
    made = {
        "images": torch.rand((1, 3, 3, 224, 224), generator=generator) * 2 - 1,
        "tokens": ids,
        "mask": torch.arange(LENGTH)[None] < tokens,
        "noise": torch.randn((1, 50, 32), generator=generator),
    }
    return {name: value.to(device) for name, value in made.items()}


def ours(
    directory: Path, device: torch.device, dtype: torch.dtype, given: dict[str, torch.Tensor]
) -> Callable[[], torch.Tensor]:
    from pi05_ros.policy.checkpoint import load_model
    from pi05_ros.policy.inference import SampleInputs, make_sampler, no_mark
    from pi05_ros.policy.prompt import Tokens

    sampler = make_sampler(load_model(directory, device, dtype), 10, "auto", cameras=3)
    ids, mask = given["tokens"][0].cpu().numpy(), given["mask"][0].cpu().numpy()
    tokens, noise = Tokens(ids, mask), given["noise"].cpu()
    asked = SampleInputs(given["images"], (True,) * 3, tokens, noise)
    return lambda: sampler.sample(asked, no_mark).cpu()


def lerobot(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    given: dict[str, torch.Tensor],
    compiled: bool = False,
) -> Callable[[], torch.Tensor]:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch
    from safetensors.torch import load_file

    precision = str(dtype).removeprefix("torch.")
    config = PI05Config(dtype=precision, device=str(device), compile_model=compiled)
    model: Any = PI05Pytorch(config)
    weights = {
        name.removeprefix("model."): value
        for name, value in load_file(directory / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    heads = {name for name in missing if "lm_head" in name or "embed_tokens" in name}
    if unexpected or set(missing) - heads:
        raise SystemExit(f"the weights do not fit: {unexpected[:3]} {sorted(missing)[:3]}")
    model = model.to(device).eval()
    images = [picture[None] for picture in given["images"][0]]
    masks = [torch.ones(1, dtype=torch.bool, device=device)] * 3

    @torch.inference_mode()
    def sample() -> torch.Tensor:
        chunk = model.sample_actions(
            images, masks, given["tokens"], given["mask"], noise=given["noise"], num_steps=10
        )
        return torch.as_tensor(chunk).float().cpu()

    return sample


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In this process; median, p99 and the chunk itself."""
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    given = inputs(options.tokens, device)
    if options.measure == "ours":
        sample = ours(options.directory, device, dtype, given)
    else:
        compiled = options.measure == "lerobot_compiled"
        sample = lerobot(options.directory, device, dtype, given, compiled)
    with torch.inference_mode():
        chunk = sample()
        seconds = []
        for _ in range(options.runs):
            begin_s = time.perf_counter()
            sample()
            seconds.append(time.perf_counter() - begin_s)
    return {"seconds": seconds, "chunk": chunk[0].tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(description="LeRobot's π0.5 beside ours")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compiled", action="store_true", help="LeRobot's compile_model, too")
    parser.add_argument("--measure", choices=["ours", "lerobot", "lerobot_compiled"])
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    ways = ["ours", "lerobot", *(["lerobot_compiled"] if options.compiled else [])]
    found: dict[str, list[float]] = {way: [] for way in ways}
    chunks = {}
    for _ in range(options.rounds):
        for way in ways:
            command = [sys.executable, *sys.orig_argv[1:], "--measure", way]
            finished = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if finished.returncode:
                raise SystemExit(f"{way}: {finished.stderr[-2000:]}")
            result = json.loads(finished.stdout.splitlines()[-1])
            found[way] += result["seconds"]
            chunks[way] = np.array(result["chunk"])
            print(f"{way}: {1e3 * statistics.median(result['seconds']):.1f} ms", file=sys.stderr)
    own = statistics.median(found["ours"])
    print("| | p50 ms | p99 ms | × ours | max |Δ action| |\n|---|---|---|---|---|")
    for way, seconds in found.items():
        p50 = statistics.median(seconds)
        apart = np.abs(chunks[way] - chunks["ours"]).max()
        p99 = float(np.quantile(seconds, 0.99))
        print(f"| {way} | {1e3 * p50:.1f} | {1e3 * p99:.1f} | {p50 / own:.2f} | {apart:.3g} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
