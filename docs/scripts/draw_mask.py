"""Draw who attends to whom in a checkpoint's network, from the network's own mask.

    python docs/scripts/draw_mask.py [CHECKPOINT] [--output FILE] [--tokens N] [--masked CAMERA]

Only config.json is read. Without a checkpoint it is π0.5 as published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pi05_ros.policy.checkpoint import checkpoint_folder
from pi05_ros.policy.config import PolicyConfig, read_config
from pi05_ros.policy.model import Pi0, block_mask


def draw(config: PolicyConfig, tokens: int, masked: str | None, path: Path) -> None:
    """Write the picture; rows are queries, columns are keys."""
    with torch.device("meta"):
        model = Pi0(config)
    suffix = model._suffix_starts(torch.device("cpu"))
    tokens = min(tokens, config.token_length)
    parts = [(name, config.sizes.image_tokens, name != masked) for name in config.cameras]
    parts += [("prompt", tokens, True), ("padding", config.token_length - tokens, False)]
    parts += [] if config.kind == "pi05" else [("state", 1, True)]
    parts.append(("actions", config.horizon, True))
    valid = torch.cat([torch.full((count,), seen) for _, count, seen in parts])
    starts = torch.cat((torch.zeros(len(valid) - len(suffix), dtype=torch.bool), suffix))
    mask = block_mask(valid[None], starts)[0, 0] & valid[:, None]
    figure = Figure(figsize=(7.5, 7))
    axis = figure.add_subplot()
    axis.imshow(mask, cmap=ListedColormap(["#eeeeee", "#1f77b4"]), interpolation="nearest")
    end, ticks, names = 0, [], []
    for name, count, seen in parts:
        if not count:
            continue
        axis.axhline(end - 0.5, color="white", linewidth=1)
        axis.axvline(end - 0.5, color="white", linewidth=1)
        ticks.append(end + count / 2)
        names.append(f"{name} ({count})" if seen or name == "padding" else f"{name} (masked)")
        end += count
    axis.set_xticks(ticks, names, rotation=40, ha="right")
    axis.set_yticks(ticks, names)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    axis.set_title("blue: the query sees the key")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser(description="who attends to whom")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--output", type=Path, default=Path("docs/images/mask.png"))
    parser.add_argument("--tokens", type=int, default=80, help="of the prompt (default: 80)")
    parser.add_argument("--masked", help="a camera that is not there")
    options = parser.parse_args()
    folder = options.checkpoint and checkpoint_folder(options.checkpoint)
    config = read_config(folder) if folder else PolicyConfig()
    draw(config, options.tokens, options.masked, options.output)


if __name__ == "__main__":
    main()
