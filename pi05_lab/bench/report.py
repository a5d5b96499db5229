"""Results of the scheduler benchmark: tables, plots, metrics file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from matplotlib.figure import Figure as Canvas
from rich.table import Table

from pi05_lab.bench.toy_task import Cost, Episode
from pi05_lab.console import make_table
from pi05_lab.evaluation.statistics import t_quantile, wilson_interval
from pi05_ros.types import FloatArray


@dataclass(frozen=True)
class Measure:
    """One column of the tables and one plot."""

    key: str
    """Field of `Episode`."""
    short: str
    title: str
    unit: str
    factor: float = 1.0
    digits: int = 0

    @property
    def label(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


def task_measures(unit: str, small: str) -> tuple[Measure, ...]:
    """All measures of a task; `unit` of its lengths, m or rad, and `small`, its thousandth."""
    return (
        Measure("success", "ok %", "success", "%", 100.0),
        Measure("time_s", "time s", "time to the goal", "s", digits=2),
        Measure("stall_s", "stall s", "stall", "s", digits=2),
        Measure("largest_step", f"step {small}", "largest step", small, 1000.0, 1),
        Measure("largest_acceleration", f"acc {unit}/s²", "largest commanded acceleration",
                f"{unit}/s²", digits=1),
        Measure("seam_jump", f"jump {small}", "largest jump at a chunk boundary", small, 1000.0, 1),
        Measure("rms_jerk", "jerk", "RMS jerk", f"{unit}/s³"),
        Measure("ldlj", "LDLJ", "LDLJ", "", digits=1),
        Measure("sparc", "SPARC", "SPARC", "", digits=2),
        Measure("action_age_s", "age ms", "action age", "ms", 1000.0),
        Measure("reaction_s", "react ms", "reaction to an instruction", "ms", 1000.0),
    )  # fmt: skip


OBSTACLE_MEASURES = task_measures("m", "mm")
REACH_MEASURES = task_measures("rad", "mrad")


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its 95 % confidence interval, in the measure's unit."""

    mean: float
    low: float
    high: float


Results = dict[str, dict[str, dict[str, Figure]]]
"""Variant → delay → key of the measure → figure."""


def summarise(episodes: Sequence[Episode], measures: Sequence[Measure]) -> Results:
    """Figures of each variant and delay, in the order of the episodes."""
    frame = pandas.DataFrame([vars(episode) for episode in episodes])
    results: Results = {}
    for (variant, delay), group in frame.groupby(["variant", "delay"], sort=False):
        results.setdefault(str(variant), {})[str(delay)] = {
            measure.key: _figure(group[measure.key].to_numpy(np.float64), measure)
            for measure in measures
        }
    return results


def _figure(values: FloatArray, measure: Measure) -> Figure:
    """Wilson's interval for success, else Student's t; NaN counts as not measured."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Figure(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    low = high = math.nan
    if measure.key == "success":
        low, high = wilson_interval(int(values.sum()), len(values)) or (low, high)
    elif len(values) > 1:
        spread = float(values.std(ddof=1))
        half = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return Figure(mean * measure.factor, low * measure.factor, high * measure.factor)


def tables(
    results: Results, measures: Sequence[Measure], costs: Mapping[str, Cost]
) -> Iterator[Table]:
    """One table per variant, with a row per delay, and one of the costs."""
    headers = ["delay", *(measure.short for measure in measures)]
    for variant, delays in results.items():
        rows = [
            (delay, *(f"{figures[m.key].mean:.{m.digits}f}" for m in measures))
            for delay, figures in delays.items()
        ]
        table = make_table(headers, rows, variant)
        table.collapse_padding = True  # fits into 80 columns
        yield table
    yield make_table(
        ("method", "p50, µs", "p99, µs"),
        [(name, f"{cost.p50_us:.0f}", f"{cost.p99_us:.0f}") for name, cost in costs.items()],
        "a tick with a new chunk: 14 joints, 50 steps, 10 live chunks",
    )


def markdown(results: Results, measures: Sequence[Measure]) -> str:
    """One table per measure, variants × delays, with the interval's half width."""
    delays = list(next(iter(results.values())))
    tables = []
    for measure in measures:
        rows, digits = [[measure.label, *delays]], measure.digits
        for variant, by_delay in results.items():
            shown = [figures[measure.key] for figures in by_delay.values()]
            cells = [f"{f.mean:.{digits}f} ± {(f.high - f.low) / 2:.{digits}f}" for f in shown]
            rows.append([variant, *cells])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * (len(delays) + 1) + "|")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def draw(results: Results, measures: Sequence[Measure], folder: Path, name: str) -> None:
    """Write `<name>_<key>.png` per measure: delays along x, error bars for 95 % intervals."""
    for measure in measures:
        canvas = Canvas(figsize=(7.0, 3.6), layout="constrained")
        axes = canvas.subplots()
        for index, (variant, by_delay) in enumerate(results.items()):
            shown = [figures[measure.key] for figures in by_delay.values()]
            means = np.array([each.mean for each in shown])
            errors = [means - [each.low for each in shown], [each.high for each in shown] - means]
            # Side by side, so that equal values stay visible.
            places = np.arange(len(means)) + (index - len(results) / 2) * 0.06
            axes.errorbar(places, means, np.abs(errors), label=variant, capsize=2,
                          marker="osv^D<>Px*"[index % 10], markersize=4, linewidth=1)  # fmt: skip
        axes.set_xticks(range(len(means)), list(by_delay))
        axes.set_xlabel("delay, observation to usable chunk")
        axes.set_ylabel(measure.label)
        if measure.key in ("largest_step", "largest_acceleration", "seam_jump", "rms_jerk"):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        canvas.savefig(folder / f"{name}_{measure.key}.png", dpi=90)
