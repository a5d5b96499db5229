"""The report's pictures, as PNG in base64."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pi05_ros.types import JointGroup

RECORDED = "#111111"
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_STYLES = {
    "policy": ("the policy", "#1f77b4", "-", 2.2),
    "hold": ("standing still", "#777777", "--", 1.5),
    "linear": ("same speed on", "#b8860b", "--", 1.5),
    "shuffled": ("other instruction", "#d62728", ":", 1.8),
    "black": ("black pictures", "#000000", ":", 1.8),
    "random": ("random pose", "#bbbbbb", "-.", 1.2),
}
_DPI = 80


def horizon_plot(policy: Mapping[str, Any]) -> str:
    """Mean error of the arms' joints against the time ahead."""
    figure = Figure(figsize=(8, 3.6))
    axis = figure.subplots()
    times_s = policy["dt_s"] * np.arange(policy["horizon"])
    conditions = policy["conditions"]
    usual = max(_peak(conditions[name]["by_step_rad"]) for name in conditions if name != "random")
    for name, (label, color, style, width) in _STYLES.items():
        if name not in conditions:
            continue
        course = _floats(conditions[name]["by_step_rad"])
        if name == "random" and np.nanmin(course) > 2 * usual:
            label += f" ({np.nanmean(course):.2f} rad, above)"
            axis.plot([], [], color=color, linestyle=style, linewidth=width, label=label)
            continue
        axis.plot(times_s, course, color=color, linestyle=style, linewidth=width, label=label)
    axis.set_ylim(0, 1.15 * usual or 1)
    axis.set_xlabel("time ahead of the observation, s")
    axis.set_ylabel("mean |error|, rad")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncol=2)
    return _png(figure)


def joint_plot(traces: Mapping[str, Any], joints: JointGroup) -> str:
    """One recording: recorded motion, chunks with a dot where they begin, commanded motion."""
    columns = 2
    rows = math.ceil(len(joints) / columns)
    figure = Figure(figsize=(13, 1.5 * rows + 0.9))
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    times = _floats(traces["times_s"])
    recorded = _table(traces["recorded"], len(joints))
    for k, name in enumerate(joints.names):
        # one arm a column where the joints are those of two
        axis = axes[k % rows][k // rows]
        millimetres = bool(joints.gripper[k]) and joints.upper[k] < 0.5
        factor, unit = (1e3, "mm") if millimetres else (1.0, "rad")
        for line_s, line in traces["chunks"]:
            axis.plot(line_s, factor * _floats(c[k] for c in line), color="0.72", linewidth=0.8)
        if len(times):
            axis.plot(times, factor * recorded[:, k], color=RECORDED, linewidth=1.6)
        for number, values in enumerate(traces["commanded"].values()):
            course = _table(values, len(joints))[:, k]
            axis.plot(times, factor * course, color=COLORS[number % len(COLORS)], linewidth=1.1)
        dots = traces["dots"]
        axis.plot(
            [t for t, _ in dots],
            [factor * row[k] for _, row in dots],
            ".", color="0.35", markersize=4,
        )  # fmt: skip
        axis.set_ylabel(f"{name.replace('_', ' ')}\n{unit}", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.01)
        axis.grid(alpha=0.2)
    for axis in axes[-1]:
        axis.set_xlabel("s", fontsize=8)
    handles = [
        axes[0][0].plot([], [], color=RECORDED, linewidth=1.6, label="recorded")[0],
        axes[0][0].plot([], [], ".-", color="0.55", label="predicted chunk, its first step")[0],
    ]
    for number, name in enumerate(traces["commanded"]):
        color = COLORS[number % len(COLORS)]
        handles += axes[0][0].plot([], [], color=color, label=f"commanded by {name}")
    figure.legend(handles=handles, loc="upper right", ncol=len(handles), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return _png(figure)


def course_plot(errors: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Error over a recording's time: the policies' and that of standing still."""
    figure = Figure(figsize=(13, 2.2))
    axis = figure.subplots()
    hold: Sequence[Sequence[float | None]] = ()
    for number, (name, rows) in enumerate(errors.items()):
        hold = rows or hold
        axis.plot(
            _floats(row[0] for row in rows), _floats(row[1] for row in rows), ".-",
            color=COLORS[number % len(COLORS)], linewidth=1.4, label=name,
        )  # fmt: skip
    label = "standing still"
    times, course = _floats(row[0] for row in hold), _floats(row[2] for row in hold)
    axis.plot(times, course, "--", color="#777777", label=label)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("s", fontsize=8)
    axis.set_ylabel("mean |error|, rad", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return _png(figure)


def _png(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _floats(values: Any) -> Any:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def _table(rows: Any, width: int) -> Any:
    return np.array([_floats(row) for row in rows]).reshape(-1, width)


def _peak(values: Any) -> float:
    known = [v for v in values if v is not None]
    return max(known, default=0.0)
