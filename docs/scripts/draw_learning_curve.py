"""Draws images/learning_curve.png from the shipped checkpoint's training logs.

python docs/scripts/draw_learning_curve.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[1]
LOGS = sorted((DOCS.parent / "pi05_ros/checkpoints/small_aloha").glob("training_log_*.jsonl"))
"""One training after the other."""
CURVES = {
    "flow": "flow",
    "flow_other_text": "flow, another frame's instruction",
    "flow_black": "flow, black pictures",
    "named_position": "helper: named cube's place",
    "pixels": "helper: cubes in the pictures",
}


def read_logs() -> list[dict[str, Any]]:
    """All entries, with steps and minutes counted on from one log to the next."""
    entries: list[dict[str, Any]] = []
    step, minutes = 0, 0.0
    for path in LOGS:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for entry in found:
            entry["step"] += step
            if entry["kind"] == "train":
                entry["minutes"] += minutes
        entries += found
        step = entries[-1]["step"]
        minutes = max(e["minutes"] for e in entries if e["kind"] == "train")
    return entries


def main() -> None:
    entries = read_logs()
    figure, axes = pyplot.subplots(figsize=(7.0, 3.8), layout="constrained")
    minutes = {e["step"]: e["minutes"] for e in entries if e["kind"] == "train"}
    found = [e for e in entries if e["kind"] == "validation" and e["step"] in minutes]
    for key, label in CURVES.items():
        points = [(minutes[e["step"]], e[key]) for e in found if key in e]
        axes.plot(*zip(*points, strict=True), marker=".", label=label)
    stages: dict[str, float] = {}
    for entry in entries:
        if entry["kind"] == "train":
            stages.setdefault(entry["stage"], entry["minutes"])
    for index, (name, start) in enumerate(stages.items()):
        axes.axvline(start, color="0.8", linewidth=1)
        axes.text(
            start,
            1.01 + 0.05 * (index % 2),
            f" {name}",
            transform=axes.get_xaxis_transform(),
            fontsize=8,
        )
    axes.set_yscale("log")
    axes.set_xlabel("minutes on two CPU cores")
    axes.set_ylabel("loss on held-out episodes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(DOCS / "images" / "learning_curve.png", dpi=100)


if __name__ == "__main__":
    main()
