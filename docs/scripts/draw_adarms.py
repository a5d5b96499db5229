"""Draw what a checkpoint's AdaRMS does over time: scale, shift and gate of every norm.

    python docs/scripts/draw_adarms.py CHECKPOINT [--output FILE]

Root mean square over the width, from the network's own modulations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pi05_ros.policy.checkpoint import checkpoint_folder, load_model
from pi05_ros.policy.model import Pi0


def draw(model: Pi0, path: Path) -> None:
    """Write the picture.

    Raises:
        ValueError: π0, whose norms do not depend on the time.
    """
    if not model.adaptive:
        raise ValueError("this is π0: its norms do not depend on the time")
    times = torch.linspace(0, 1, 101)
    with torch.inference_mode():
        modulations = model.time_features(times)
    strength = modulations.square().mean(-1).sqrt()  # [time, norm, scale|shift|gate]
    depth = model.config.sizes.exp.depth
    ticks = [*range(0, 2 * depth, max(2, depth // 9 * 2)), 2 * depth]
    figure = Figure(figsize=(12, 4.2))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, index, name in zip(axes, range(3), ("scale", "shift", "gate"), strict=True):
        values = strength[:, :, index].T
        picture = axis.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            extent=(0, 1, -0.5, len(values) - 0.5),
        )
        axis.set_title(f"{name}, RMS over the width")
        axis.set_xlabel("t: 0 is the action, 1 is noise")
        figure.colorbar(picture, ax=axis)
    axes[0].set_yticks(ticks, [*(f"layer {tick // 2}" for tick in ticks[:-1]), "final"])
    axes[0].set_ylabel("norm (two a layer, then the final one)")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Read the options and draw."""
    parser = argparse.ArgumentParser(description="AdaRMS over time")
    parser.add_argument("checkpoint")
    parser.add_argument("--output", type=Path, default=Path("docs/images/adarms.png"))
    options = parser.parse_args()
    draw(load_model(checkpoint_folder(options.checkpoint)), options.output)


if __name__ == "__main__":
    main()
