"""Draw π0.5's data flow with the shapes and parameter counts of the network that the code builds.

    python docs/scripts/draw_data_flow.py [CHECKPOINT] [--output FILE]

Only config.json is read. Without a checkpoint it is π0.5 as published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pi05_ros.policy.checkpoint import checkpoint_folder
from pi05_ros.policy.config import PolicyConfig, read_config
from pi05_ros.policy.model import Pi0

ONCE, STEPS, INPUT = "#d6e8f7", "#fde3c8", "#eeeeee"


def draw(config: PolicyConfig, path: Path) -> None:
    """Write the picture."""
    with torch.device("meta"):
        model = Pi0(config)

    def count(*parts: str) -> str:
        number = sum(p.numel() for name, p in model.named_parameters() if name.startswith(parts))
        return f"{number / 1e6:,.{1 if number > 1e6 else 2}f} M parameters"

    size, horizon, dim = config.sizes, config.horizon, config.max_action_dim
    pictures = len(config.cameras) * size.image_tokens
    side = f"{size.image} × {size.image} RGB"
    state = "state in the prompt" if config.kind == "pi05" else "state as a token of the suffix"
    boxes = {
        "images": (1.3, 6, INPUT, f"{len(config.cameras)} pictures\n{side}"),
        "vision": (1.3, 4.6, ONCE, f"SigLIP, {size.vis.depth} layers\n{count('vision.')}"),
        "text": (4.3, 6, INPUT, f"prompt, ≤ {config.token_length} tokens\n{state}"),
        "embed": (4.3, 4.6, ONCE, f"embedding × √{size.vlm.width}\n{count('embedder.')}"),
        "vlm": (
            2.8, 2.9, ONCE,
            f"language model, {size.vlm.depth} layers × {size.vlm.width}\n"
            f"{pictures} + prompt tokens, bidirectional\n{count('experts.vlm.')}",
        ),
        "cache": (
            2.8, 1.2, ONCE,
            f"keys and values of every layer\n{size.vlm.depth} × 2 × {size.vlm.kv_heads} × "
            f"{size.vlm.head_dim} a token",
        ),
        "noise": (8.2, 6, INPUT, f"noise at t = 1\n{horizon} × {dim}"),
        "x": (8.2, 4.6, STEPS, f"x at t → {horizon} tokens\n{count('action_in')}"),
        "time": (11.2, 4.6, STEPS, f"t → sinusoid → MLP\n{count('time_', 'action_time')}"),
        "expert": (
            8.2, 2.9, STEPS,
            f"action expert, {size.exp.depth} layers × {size.exp.width}\n"
            f"{horizon} tokens see prefix and each other\n{count('experts.action.')}",
        ),
        "v": (8.2, 1.2, STEPS, f"v: x ← x − v / {config.num_steps}\n{config.num_steps} times"),
        "actions": (11.2, 1.2, INPUT, f"actions at t = 0\n{horizon} × {dim}, cut to the robot's"),
    }  # fmt: skip
    arrows = [
        ("images", "vision"), ("vision", "vlm"), ("text", "embed"), ("embed", "vlm"),
        ("vlm", "cache"), ("cache", "expert"), ("noise", "x"), ("x", "expert"),
        ("time", "expert"), ("expert", "v"), ("v", "actions"),
    ]  # fmt: skip
    figure = Figure(figsize=(12.5, 5.4))
    axis = figure.add_subplot()
    patches = {}
    for name, (x, y, colour, text) in boxes.items():
        style = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "0.4"}
        label = axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style, zorder=2)
        patches[name] = label.get_bbox_patch()
    for start, end in arrows:
        ends = {"patchA": patches[start], "patchB": patches[end], "shrinkA": 2, "shrinkB": 2}
        style = {"arrowstyle": "->", "color": "0.3"}
        axis.annotate("", boxes[end][:2], boxes[start][:2], arrowprops={**ends, **style}, zorder=1)
    label = "AdaRMS: scale, shift, gate" if model.adaptive else "mixed into the action tokens"
    axis.text(11.3, 3.7, label, fontsize=9, ha="center")
    axis.text(5.4, 2.3, "attention", fontsize=9, ha="center")
    axis.text(5.4, 0.35, "blue: once a chunk    orange: every step", fontsize=9, ha="center")
    axis.set(xlim=(-0.2, 12.7), ylim=(0.1, 6.6))
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser(description="the data flow")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--output", type=Path, default=Path("docs/images/data_flow.png"))
    options = parser.parse_args()
    folder = options.checkpoint and checkpoint_folder(options.checkpoint)
    draw(read_config(folder) if folder else PolicyConfig(), options.output)


if __name__ == "__main__":
    main()
