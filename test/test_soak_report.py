"""The soak's verdict; faults: a leak that passes, a level that counts as one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from soak_memory import Sample, growth
from soak_report import Outcome, report

TIMES_S = np.arange(0.0, 1600.0)
RNG = np.random.default_rng(0)
LEVELS_MB = 560.0 + 38.0 * (np.sin(TIMES_S / 37.0) > 0.3) + RNG.normal(0.0, 2.0, TIMES_S.size)
"""Up by a stall's pictures, down by a configure, and what is under way."""


def outcome(memory_mb: np.ndarray, **changes: object) -> Outcome:
    samples = [
        Sample(at_s, mb, mb - 100.0, mb - 200.0, 21, 23)
        for at_s, mb in zip(TIMES_S, memory_mb, strict=False)
    ]
    recovery_s = {"a camera stops": [0.2, 0.4], "policy: oom": [1.5]}
    values = {"recovery_s": recovery_s, "samples": samples, "settled_s": 0.0, **changes}
    return Outcome(minutes=30.0, trajectories=9000, **values)


def test_levels_are_no_growth_and_a_leak_is() -> None:
    grown = growth(TIMES_S, LEVELS_MB)
    assert abs(grown.share) < 0.005 and abs(grown.per_minute) < 0.1
    leak = growth(TIMES_S, LEVELS_MB + 0.75 * TIMES_S / 60.0)
    assert leak.share > 0.02
    assert leak.per_minute == pytest.approx(0.75, abs=0.1)
    with pytest.raises(ValueError, match="48 values"):
        growth(TIMES_S[:47], LEVELS_MB[:47])


def test_the_report_says_what_was_wrong() -> None:
    text, well = report(outcome(LEVELS_MB))
    assert well
    assert "30 minutes, 3 faults, 9000 trajectories" in text
    assert "| a camera stops | 2 | 0.30 | 0.40 |" in text
    for wrong, words in (
        ({"tracebacks": 1}, "| uncaught exceptions | 1 |"),
        ({"ended": ["node"]}, "| processes that ended by themselves | 1: node |"),
        ({"violations": 2}, "| trajectories beyond a limit | 2 |"),
        ({"lost": ["policy: oom"]}, "| 1: policy: oom |"),
        ({"settled_s": 1590.0}, "Too short"),
    ):
        text, well = report(outcome(LEVELS_MB, **wrong))
        assert words in text and not well
    assert not report(outcome(LEVELS_MB + 0.75 * TIMES_S / 60.0))[1]
