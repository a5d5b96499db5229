"""Commanded against measured joints, with the chunk arrivals marked."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pi05_lab.demo.report import DemoRecord

ARMS = ("left", "right")


def plot(record: DemoRecord, path: Path) -> None:
    """Write a PNG: one row per joint, one column per arm, one time axis."""
    rows = [name.removeprefix("left_") for name in record.joint_names if name.startswith("left_")]
    figure = Figure(figsize=(13, 1.45 * len(rows) + 1.2))
    axes = figure.subplots(len(rows), 2, sharex=True, squeeze=False)
    times, measured = record.measured_between()
    start_s = times[0] if len(times) else 0.0
    for k, joint in enumerate(rows):
        for column, arm in enumerate(ARMS):
            axis = axes[k][column]
            name = f"{arm}_{joint}"
            unit, factor = ("mm", 1e3) if "gripper" in joint else ("rad", 1.0)
            for arrival_s, _, _ in record.chunks:
                axis.axvline(arrival_s - start_s, color="0.85", linewidth=0.8, zorder=0)
            for when_s, _ in record.instructions:
                axis.axvline(when_s - start_s, color="tab:red", linewidth=1.0, zorder=1)
            commanded_s, commanded = record.commanded_joint(name)
            axis.plot(
                commanded_s - start_s, commanded * factor, color="tab:blue", linewidth=1.6,
                label="commanded",
            )  # fmt: skip
            axis.plot(
                times - start_s,
                measured[:, record.joint_names.index(name)] * factor,
                color="tab:orange",
                linewidth=1.0,
                label="measured",
            )
            axis.set_ylabel(f"{joint.replace('_', ' ')}\n{unit}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.margins(x=0.01)
            if k == 0:
                axis.set_title(f"{arm} arm", fontsize=10)
    for column in range(2):
        axes[-1][column].set_xlabel("s after the first instruction", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles += [Line2D([], [], color="0.85"), Line2D([], [], color="tab:red")]
    labels += ["chunk arrives", "instruction arrives"]
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8)
    figure.suptitle("; ".join(text for _, text in record.instructions), x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    figure.savefig(path, dpi=110)
