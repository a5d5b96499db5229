"""The scheduler benchmark's results: table, figures, metrics.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from pi05_lab.bench.toy_task import Cost, Episode
from pi05_lab.evaluation.statistics import t_quantile, wilson_interval


@dataclass(frozen=True)
class Measure:
    """One column of the table and one figure."""

    key: str
    """Field of `Episode`."""
    short: str
    title: str
    unit: str
    factor: float = 1.0
    digits: int = 0


def task_measures(unit: str, small: str) -> tuple[Measure, ...]:
    """All measures of a task.

    Args:
        unit: of lengths, m or rad.
        small: its thousandth.
    """
    return (
        Measure("success", "ok %", "success", "%", 100.0),
        Measure("time_s", "time s", "time to the goal", "s", digits=2),
        Measure("stall_s", "stall s", "stall", "s", digits=2),
        Measure("largest_step", f"step {small}", "largest step", small, 1000.0, 1),
        Measure("largest_acceleration", f"acc {unit}/s²", "largest acceleration asked for",
                f"{unit}/s²", digits=1),
        Measure("seam_jump", f"seam {small}", "largest seam jump", small, 1000.0, 1),
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
    """A mean with its 95 % confidence interval, in the measure's unit."""

    mean: float
    low: float
    high: float


def summarise(episodes: Sequence[Episode], measure: Measure) -> Figure:
    """Mean over the seeds that have it; Wilson's interval for success, Student's t else."""
    values = np.array([getattr(episode, measure.key) for episode in episodes], dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return Figure(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if measure.key == "success":
        interval = wilson_interval(int(values.sum()), len(values))
        assert interval is not None
        low, high = interval
    else:
        half = math.nan
        if len(values) > 1:
            spread = float(values.std(ddof=1))
            half = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
        low, high = mean - half, mean + half
    factor = measure.factor
    return Figure(mean * factor, low * factor, high * factor)


def group(episodes: Sequence[Episode]) -> dict[str, dict[str, list[Episode]]]:
    """Variant → delay → episodes, in the order of arrival."""
    groups: dict[str, dict[str, list[Episode]]] = {}
    for episode in episodes:
        groups.setdefault(episode.variant, {}).setdefault(episode.delay, []).append(episode)
    return groups


def table(variant: str, delays: dict[str, list[Episode]], columns: Sequence[Measure]) -> Table:
    """One method over the delays."""
    shown = Table(title=variant, title_justify="left", box=SIMPLE, padding=(0, 0))
    shown.add_column("delay", no_wrap=True)
    for measure in columns:
        shown.add_column(measure.short, justify="right", no_wrap=True)
    for delay, episodes in delays.items():
        cells = [f"{summarise(episodes, m).mean:.{m.digits}f}" for m in columns]
        shown.add_row(delay, *cells)
    return shown


def cost_table(costs: dict[str, Cost]) -> Table:
    shown = Table(title="a tick with a new chunk: 14 joints, 50 steps, 10 live chunks",
                  title_justify="left", box=SIMPLE)  # fmt: skip
    for column in ("method", "p50, µs", "p99, µs"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for variant, cost in costs.items():
        shown.add_row(variant, f"{cost.p50_us:.0f}", f"{cost.p99_us:.0f}")
    return shown


def markdown(episodes: Sequence[Episode], columns: Sequence[Measure]) -> str:
    """One table per measure, methods × delays, with the interval's half width."""
    groups = group(episodes)
    parts = []
    for measure in columns:
        delays = list(next(iter(groups.values())))
        unit = f", {measure.unit}" if measure.unit else ""
        lines = [f"| {measure.title}{unit} | " + " | ".join(delays) + " |",
                 "|---" * (len(delays) + 1) + "|"]  # fmt: skip
        for variant, by_delay in groups.items():
            cells = []
            for found in by_delay.values():
                figure = summarise(found, measure)
                half = (figure.high - figure.low) / 2
                cells.append(f"{figure.mean:.{measure.digits}f} ± {half:.{measure.digits}f}")
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def write_metrics(
    episodes: Sequence[Episode],
    columns: Sequence[Measure],
    costs: dict[str, Cost],
    header: dict[str, Any],
    path: Path,
) -> None:
    """Means and intervals of every pair, and the costs."""
    document = {
        **header,
        "results": {
            variant: {
                delay: {m.key: asdict(summarise(found, m)) for m in columns}
                for delay, found in by_delay.items()
            }
            for variant, by_delay in group(episodes).items()
        },
        "cost": {variant: asdict(cost) for variant, cost in costs.items()},
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def draw(
    episodes: Sequence[Episode], columns: Sequence[Measure], folder: Path, name: str = "scheduler"
) -> list[Path]:
    """One figure per measure, delays along x, an error bar for the 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = group(episodes)
    paths = []
    for measure in columns:
        figure, axes = pyplot.subplots(figsize=(7.0, 3.6), layout="constrained")
        for index, (variant, by_delay) in enumerate(groups.items()):
            summaries = [summarise(found, measure) for found in by_delay.values()]
            means = np.array([summary.mean for summary in summaries])
            errors = [means - [s.low for s in summaries], [s.high for s in summaries] - means]
            # side by side, so that equal values stay visible
            places = np.arange(len(means)) + (index - len(groups) / 2) * 0.06
            axes.errorbar(places, means, yerr=np.abs(errors), label=variant, marker="osv^D<>Px*"[
                index % 10], markersize=4, linewidth=1, capsize=2)  # fmt: skip
        axes.set_xticks(range(len(means)), list(by_delay))
        axes.set_xlabel("delay, observation to usable chunk")
        axes.set_ylabel(f"{measure.title}{', ' + measure.unit if measure.unit else ''}")
        if measure.key in ("largest_step", "largest_acceleration", "seam_jump", "rms_jerk"):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        path = folder / f"{name}_{measure.key}.png"
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        paths.append(path)
    return paths
