"""Held-out flow loss of the trainings of examples/small_policy/two_stage.yaml → two_stage.png.

    python docs/scripts/draw_two_stage.py [runs]

`runs` has the folders flow, joint and insulated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from pi05_lab.training.metrics import LOG_FILE, read_log

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUTPUT = Path(__file__).parents[1] / "images" / "two_stage.png"
RUNS = {
    "flow": "flow alone",
    "joint": "flow and action tokens",
    "insulated": "both, gradient stopped",
}
VISION_STEPS = 500


def main(folder: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, label in RUNS.items():
        entries = [
            entry
            for entry in read_log(folder / name / LOG_FILE)
            if entry["kind"] == "validation" and "flow" in entry
        ]
        steps = [entry["step"] - VISION_STEPS for entry in entries]
        left.plot(steps, [entry["flow"] for entry in entries], marker=".", label=label)
        ratio = [entry["flow_other_text"] / entry["flow"] for entry in entries]
        right.plot(steps, ratio, marker=".", label=label)
    left.set(xlabel="steps of the second stage", ylabel="flow loss", yscale="log")
    right.set(xlabel="steps of the second stage", ylabel="loss with another instruction / own")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs"))
