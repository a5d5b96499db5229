"""Draws the packages and their imports: docs/images/packages.png.

Imports of pi05_ros.types and of the runtime by the lab are left out.

python docs/scripts/draw_packages.py
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"pi05_ros": "#d7e8f7", "pi05_lab": "#fbe6cc"}
ROWS = (
    ("pi05_lab.demo", "pi05_lab.bench"),
    ("pi05_lab.evaluation", "pi05_lab.training"),
    ("pi05_lab.data",),
    ("pi05_lab.sim",),
    ("pi05_ros.nodes", "pi05_ros.check"),
    ("pi05_ros.runner", "pi05_ros.server"),
    ("pi05_ros.config", "pi05_ros.adapters"),
    ("pi05_ros.policy", "pi05_ros.executor", "pi05_ros.observation", "pi05_ros.control"),
    ("pi05_ros.types",),
)
JOINED = {
    "pi05_ros.runner_factory": "pi05_ros.runner",
    "pi05_ros.requests": "pi05_ros.runner",
    "pi05_ros.device_errors": "pi05_ros.executor",
    "pi05_ros.robot_config": "pi05_ros.config",
    "pi05_ros.protocol": "pi05_ros.adapters",
}
"""Modules drawn in another's box."""


def box_of(module: str) -> str:
    name = ".".join(module.split(".")[:2])
    return JOINED.get(name, name)


def imported_boxes() -> dict[str, set[str]]:
    """Box → boxes that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for package in COLOURS:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in COLOURS:
                    found[box_of(".".join(parts))].add(box_of(str(node.module)))
    return found


def lines_of(box: str) -> int:
    package, name = box.split(".")
    members = [module.split(".")[1] for module, home in JOINED.items() if home == box]
    paths = [
        path
        for member in (name, *members)
        for path in (
            (ROOT / package / f"{member}.py",)
            if (ROOT / package / f"{member}.py").exists()
            else (ROOT / package / member).rglob("*.py")
        )
    ]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main() -> None:
    places = {
        box: ((index + 0.5) / len(row), len(ROWS) - level)
        for level, row in enumerate(ROWS)
        for index, box in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(9, 8))
    for box, targets in imported_boxes().items():
        for target in sorted(targets - {box}):
            same_package = box.split(".")[0] == target.split(".")[0]
            if same_package and {box, target} <= set(places) - {"pi05_ros.types"}:
                (x, y), (to_x, to_y) = places[box], places[target]
                axes.annotate(
                    "",
                    (to_x, to_y + 0.36),
                    (x, y - 0.36),
                    arrowprops={"arrowstyle": "-|>", "color": "#999999", "lw": 0.9},
                )
    for box, (x, y) in places.items():
        package, name = box.split(".")
        axes.text(
            x,
            y,
            f"{name}\n{lines_of(box):,} lines",
            ha="center",
            va="center",
            fontsize=11,
            bbox={"boxstyle": "round,pad=0.5", "fc": COLOURS[package], "ec": "#555555"},
        )
    axes.axhline(len(ROWS) - 3.5, color="#555555", lw=0.8, ls="--")
    axes.text(0.0, len(ROWS) - 3.45, "pi05_lab", va="bottom", fontsize=12, weight="bold")
    axes.text(0.0, len(ROWS) - 3.55, "pi05_ros", va="top", fontsize=12, weight="bold")
    axes.set(xlim=(0, 1), ylim=(0.5, len(ROWS) + 0.5))
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "images" / "packages.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
