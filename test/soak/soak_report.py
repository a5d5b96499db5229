"""The soak's figures as Markdown, and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from soak_faults import RECOVERY_LIMIT_S
from soak_memory import SMALLEST_SERIES, Sample, growth

GROWTH_LIMIT = 0.02
"""Of RSS and anonymous memory; PSS depends on the other processes that share the libraries."""
NAMED = 10
"""Findings of one row that are printed."""
COUNT_LIMIT = 1
"""Of additional threads and files; a leak per configure would be a dozen."""


@dataclass
class Outcome:
    """Counts and findings of a run."""

    minutes: float
    trajectories: int = 0
    boundaries: int = 0
    """Chunk boundaries in motion that were compared."""
    violations: Sequence[str] = ()
    """One line per trajectory that fails a check."""
    tracebacks: int = 0
    ended: Sequence[str] = ()
    """Processes that ended by themselves."""
    lost: Sequence[str] = ()
    """Faults that were not recovered from."""
    unreported: Sequence[str] = ()
    """Faults that the status did not name, and parameters that were refused."""
    exit_codes: Sequence[int] = ()
    """Other than 0, after SIGTERM."""
    recovery_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    resumed: Mapping[str, int] = field(default_factory=dict)
    """Fault → how often its recovery needed `~/resume` after it."""
    samples: Sequence[Sample] = ()
    """Of the policy node, in time order."""
    settled_s: float = 0.0
    """Start of the memory measurement, by time.monotonic."""


def settled(outcome: Outcome) -> list[Sample]:
    return [sample for sample in outcome.samples if sample.at_s >= outcome.settled_s]


def report(outcome: Outcome) -> tuple[str, bool]:
    """Markdown, and whether the run passed; a run too short to measure memory fails."""
    faults = sum(map(len, outcome.recovery_s.values())) + len(outcome.lost)
    lines = [
        f"{outcome.minutes:g} minutes, {faults} faults, {outcome.trajectories} trajectories, "
        f"{outcome.boundaries} chunk boundaries in motion compared.",
        "",
        "| | |",
        "|---|---|",
        f"| uncaught exceptions | {outcome.tracebacks} |",
        f"| processes that ended by themselves | {_counted(outcome.ended)} |",
        f"| exit codes other than 0 after SIGTERM | {_counted(outcome.exit_codes)} |",
        f"| trajectories that fail a check | {_counted(outcome.violations)} |",
        f"| faults that the status does not name | {_counted(outcome.unreported)} |",
        f"| faults without recovery in {RECOVERY_LIMIT_S:g} s | {_counted(outcome.lost)} |",
        "",
    ]
    memory, steady = _memory(outcome)
    lines += memory
    lines += [
        "",
        "| fault | times | recovery, median s | longest s | by `~/resume` |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {len(times_s)} | {np.median(times_s):.2f} | {max(times_s):.2f} "
        f"| {outcome.resumed.get(name, 0)} |"
        for name, times_s in sorted(outcome.recovery_s.items())
    ]
    failed = (
        outcome.tracebacks
        or outcome.ended
        or outcome.exit_codes
        or outcome.violations
        or outcome.unreported
        or outcome.lost
    )
    return "\n".join(lines), steady and not failed


def _counted(names: Sequence[object]) -> str:
    shown = [str(name).replace("|", "/") for name in names[:NAMED]]
    more = ["…"] if len(names) > NAMED else []
    return f"{len(names)}" + (f": {', '.join([*shown, *more])}" if names else "")


def _memory(outcome: Outcome) -> tuple[list[str], bool]:
    samples = settled(outcome)
    if len(samples) < SMALLEST_SERIES:
        return ["Too short to measure the node's memory."], False
    times_s = [sample.at_s for sample in samples]
    over_s = times_s[-1] - times_s[0]
    lines = [
        f"The policy node from the end of the first round of faults on, {over_s / 60:.1f} minutes, "
        f"{len(samples)} samples: 95th percentile of the first and of the last quarter, Theil–Sen "
        "slope of twelve intervals' 95th percentiles.",
        "",
        "| | first quarter | last quarter | growth | per minute |",
        "|---|---|---|---|---|",
    ]
    figures = {
        "RSS, MB": [sample.rss_mb for sample in samples],
        "PSS, MB": [sample.pss_mb for sample in samples],
        "anonymous, MB": [sample.anonymous_mb for sample in samples],
        "threads": [sample.threads for sample in samples],
        "open files": [sample.files for sample in samples],
    }
    grown = {name: growth(times_s, values) for name, values in figures.items()}
    lines += [
        f"| {name} | {g.first:.0f} | {g.last:.0f} | {100 * g.share:+.1f} % | {g.per_minute:+.2f} |"
        for name, g in grown.items()
    ]
    steady = all(grown[name].share < GROWTH_LIMIT for name in ("RSS, MB", "anonymous, MB"))
    counts = (grown[name] for name in ("threads", "open files"))
    return lines, steady and all(g.last - g.first <= COUNT_LIMIT for g in counts)
