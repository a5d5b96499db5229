"""report.html: one file that loads nothing, the verdict first."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from pi05_lab.evaluation.open_loop.conditions import Condition
from pi05_lab.evaluation.open_loop.results import Numbers, RecordingResult, TraceRow, WorstSample
from pi05_lab.evaluation.open_loop.summary import Change, JointSummary, PolicySummary, Summary
from pi05_lab.evaluation.open_loop.verdict import overview, verdicts
from pi05_ros.types import FloatArray, JointGroup

MAX_DRAWN = 3
"""Recordings with plots of every joint: the worst, the middle one, the best."""
LABELS = {
    Condition.POLICY: "policy",
    Condition.HOLD: "hold position",
    Condition.CONSTANT_VELOCITY: "constant velocity",
    Condition.RANDOM_POSE: "random pose",
    Condition.SUBSET: "policy (ablation subset)",
    Condition.WRONG_INSTRUCTION: "… wrong instruction",
    Condition.BLACK_IMAGES: "… all images black",
}
_UNKNOWN = "–"
_RECORDED = "#111111"
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_STYLES = {
    Condition.POLICY: ("policy", "#1f77b4", "-", 2.2),
    Condition.HOLD: ("hold position", "#777777", "--", 1.5),
    Condition.CONSTANT_VELOCITY: ("constant velocity", "#b8860b", "--", 1.5),
    Condition.WRONG_INSTRUCTION: ("wrong instruction", "#d62728", ":", 1.8),
    Condition.BLACK_IMAGES: ("black images", "#000000", ":", 1.8),
    Condition.RANDOM_POSE: ("random pose", "#bbbbbb", "-.", 1.2),
}
_DPI = 80


def render(summary: Summary, results: Sequence[RecordingResult], joints: JointGroup) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=_number, percent=_percent, three=_three, change=_change, ratio=_ratio
    )
    drawn = _drawn(summary, results)
    return environment.get_template("report.html.j2").render(
        summary=summary,
        overview=overview(summary),
        verdicts=verdicts(summary),
        delay_ms=1e3 * summary.settings.get("delay_s", 0.0),
        label=_label,
        baselines=Condition.BASELINES,
        horizon_plots={
            name: horizon_plot(policy)
            for name, policy in summary.policies.items()
            if Condition.POLICY in policy.conditions
            and any(error is not None for error in policy.conditions[Condition.POLICY].by_step_rad)
        },
        drawn=drawn,
        error_plots=[
            error_plot({name: policy.traces.errors for name, policy in result.policies.items()})
            for result in drawn
        ],
        joint_plots=[
            {
                name: joint_plot(policy.traces, joints)
                for name, policy in result.policies.items()
                if policy.traces.times_s or policy.traces.chunks
            }
            for result in drawn
        ],
        worst=list(_worst(summary, results)),
        settings={name.replace("_", " "): _setting(v) for name, v in summary.settings.items()},
    )


def _label(condition: str) -> str:
    return LABELS.get(condition, "… " + condition.replace("black:", "black ") + " alone")


def _drawn(summary: Summary, results: Sequence[RecordingResult]) -> list[RecordingResult]:
    """The recordings to draw, the worst first by the first policy's error."""

    def error(index: int) -> float:
        errors = [mae[Condition.POLICY] for mae in summary.recordings[index].mae_rad.values()]
        return next((value for value in errors if value is not None), -1.0)

    order = sorted(range(len(results)), key=error, reverse=True)
    if len(order) > MAX_DRAWN:
        order = [order[0], order[len(order) // 2], order[-1]]
    return [results[index] for index in order]


def _worst(
    summary: Summary, results: Sequence[RecordingResult]
) -> Iterator[tuple[str, str, WorstSample]]:
    """Policy, recording and sample, the worst of each policy first."""
    count = summary.settings.get("worst", MAX_DRAWN)
    for name in summary.policies:
        samples = [
            (result.name, sample)
            for result in results
            if name in result.policies
            for sample in result.policies[name].worst
        ]
        samples.sort(key=lambda each: -each[1].error)
        for recording, sample in samples[:count]:
            yield name, recording, sample


def _number(value: float | None, digits: int = 3) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{100 * value:.1f} %"


def _three(values: Numbers, digits: int = 1) -> list[str]:
    """Three numbers, unknown where there are fewer."""
    return ([_number(value, digits) for value in values] + [_UNKNOWN] * 3)[:3]


def _change(change: Change | None) -> str:
    if change is None or change.share is None:
        return _UNKNOWN
    text = f"{100 * change.share:+.0f} %"
    low, high = change.share_95 or (None, None)
    if low is not None and high is not None:
        text += f" ({100 * low:+.0f} to {100 * high:+.0f})"
    return text


def _ratio(joint: JointSummary) -> str:
    """Error of the policy over that of holding the position."""
    if joint.mae is None or not joint.hold_mae or not joint.range:
        return _UNKNOWN
    return f"{joint.mae / joint.hold_mae:.2f}"


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(str(each) for each in value) or _UNKNOWN
    return _UNKNOWN if value is None else str(value)


def horizon_plot(policy: PolicySummary) -> str:
    """Mean error of the arms' joints against the time ahead."""
    figure = Figure(figsize=(8, 3.6))
    axis = figure.subplots()
    times_s = policy.dt_s * np.arange(policy.horizon)
    errors = {name: policy.conditions[name].by_step_rad for name in policy.conditions}
    usual = max(_peak(values) for name, values in errors.items() if name != Condition.RANDOM_POSE)
    for name, (label, color, style, width) in _STYLES.items():
        if name not in errors:
            continue
        curve = _floats(errors[name])
        if name == Condition.RANDOM_POSE and np.nanmin(curve) > 2 * usual:
            label += f" ({np.nanmean(curve):.2f} rad, above)"
            axis.plot([], [], color=color, linestyle=style, linewidth=width, label=label)
            continue
        axis.plot(times_s, curve, color=color, linestyle=style, linewidth=width, label=label)
    axis.set_ylim(0, 1.15 * usual or 1)
    axis.set_xlabel("time ahead of the observation, s")
    axis.set_ylabel("mean |error|, rad")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncol=2)
    return _png(figure)


def joint_plot(traces: TraceRow, joints: JointGroup) -> str:
    """One recording: recorded motion, chunks with a dot at their first step, commanded motion."""
    rows = math.ceil(len(joints) / 2)
    figure = Figure(figsize=(13, 1.5 * rows + 0.9))
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    times_s = _floats(traces.times_s)
    recorded = _table(traces.recorded, len(joints))
    for k, name in enumerate(joints.names):
        # The joints of two arms: one column each.
        axis = axes[k % rows][k // rows]
        millimetres = bool(joints.gripper[k]) and joints.upper[k] < 0.5
        factor, unit = (1e3, "mm") if millimetres else (1.0, "rad")
        for line_s, line in traces.chunks:
            axis.plot(line_s, factor * _floats(c[k] for c in line), color="0.72", linewidth=0.8)
        if len(times_s):
            axis.plot(times_s, factor * recorded[:, k], color=_RECORDED, linewidth=1.6)
        for number, values in enumerate(traces.commanded.values()):
            commanded = _table(values, len(joints))[:, k]
            color = _COLORS[number % len(_COLORS)]
            axis.plot(times_s, factor * commanded, color=color, linewidth=1.1)
        dots_s = [time_s for time_s, _ in traces.dots]
        dots = [factor * row[k] for _, row in traces.dots]
        axis.plot(dots_s, dots, ".", color="0.35", markersize=4)
        axis.set_ylabel(f"{name.replace('_', ' ')}\n{unit}", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.01)
        axis.grid(alpha=0.2)
    for axis in axes[-1]:
        axis.set_xlabel("s", fontsize=8)
    legend = axes[0][0]
    handles = [
        *legend.plot([], [], color=_RECORDED, linewidth=1.6, label="recorded"),
        *legend.plot([], [], ".-", color="0.55", label="predicted chunk, its first step"),
    ]
    for number, name in enumerate(traces.commanded):
        color = _COLORS[number % len(_COLORS)]
        handles += legend.plot([], [], color=color, label=f"commanded by {name}")
    figure.legend(handles=handles, loc="upper right", ncol=len(handles), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return _png(figure)


def error_plot(errors: Mapping[str, Sequence[Numbers]]) -> str:
    """Errors over a recording's time: of the policies and of holding the position."""
    figure = Figure(figsize=(13, 2.2))
    axis = figure.subplots()
    hold: Sequence[Numbers] = ()
    for number, (name, rows) in enumerate(errors.items()):
        hold = rows or hold
        times_s, curve = _floats(row[0] for row in rows), _floats(row[1] for row in rows)
        color = _COLORS[number % len(_COLORS)]
        axis.plot(times_s, curve, ".-", color=color, linewidth=1.4, label=name)
    times_s, curve = _floats(row[0] for row in hold), _floats(row[2] for row in hold)
    axis.plot(times_s, curve, "--", color="#777777", label="hold position")
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


def _floats(values: Any) -> FloatArray:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def _table(rows: Any, width: int) -> FloatArray:
    return np.array([_floats(row) for row in rows]).reshape(-1, width)


def _peak(values: Numbers) -> float:
    return max((v for v in values if v is not None), default=0.0)
