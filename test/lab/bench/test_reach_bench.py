"""The reaching task with the scripted expert. Faults pinned: measures that are not of the motion,
episodes that depend on their worker."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi05_lab.bench import reach as reach_bench
from pi05_lab.bench import toy_task as scheduler_bench
from pi05_lab.bench.reach import REACTION_LIMIT_S, ReachBench, reaction_s
from pi05_lab.bench.toy_task import DELAYS
from pi05_ros.cli import main


@pytest.fixture(scope="module")
def bench() -> Iterator[ReachBench]:
    bench = ReachBench("expert")
    yield bench
    bench.close()


def test_the_expert_reaches_and_reacts(bench: ReachBench) -> None:
    episode = bench.episode("latest", DELAYS[2], 0)
    assert episode.success and 0.5 < episode.time_s < 4
    assert episode.stall_s < 0.1
    # limits of 2 rad/s for each of twelve joints at 50 Hz
    assert 0 < episode.largest_step < 0.2
    assert 0.1 <= episode.action_age_s < 0.35
    # at least one inference
    assert 0.1 < episode.reaction_s < 0.8
    assert math.isnan(bench.episode("latest", DELAYS[2], 1).reaction_s)


def test_arms_that_never_react_have_the_largest_reaction_time() -> None:
    """Fault: they were omitted, which favoured the slowest methods."""
    straight = np.zeros((200, 2))
    late, never = straight.copy(), straight.copy()
    late[60:] = 1.0
    assert reaction_s(straight, late, 1.0, 0.02) == pytest.approx(0.2)
    assert reaction_s(straight, never, 1.0, 0.02) == REACTION_LIMIT_S
    assert math.isnan(reaction_s(straight[:40], never, 1.0, 0.02))


def test_an_episode_repeats(bench: ReachBench) -> None:
    again = ReachBench("expert")
    first, second = (b.episode("temporal_ensemble", DELAYS[-1], 3) for b in (bench, again))
    again.close()
    for mine, other in zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True):
        assert mine == other or (math.isnan(mine) and math.isnan(other))


def test_sync_stalls_for_the_delay(bench: ReachBench) -> None:
    assert bench.episode("sync", DELAYS[4], 2).stall_s > bench.episode("sync", DELAYS[0], 2).stall_s


def test_the_command_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_bench, "METHODS", ("latest",))
    monkeypatch.setattr(reach_bench, "DELAYS", DELAYS[:1])
    cost = scheduler_bench.measure_cost(ticks=100)
    monkeypatch.setattr(scheduler_bench, "measure_cost", lambda: cost)
    arguments = ["--task", "reach", "--checkpoint", "expert", "--seeds", "2"]
    arguments += ["--first-seed", "1", "--workers", "1", "--output", str(tmp_path)]
    assert main(["bench", "scheduler", *arguments]) == 0
    metrics = json.loads((tmp_path / "reach_metrics.json").read_text())
    assert metrics["results"]["latest"]["0 ms"]["success"]["mean"] == 100
    assert (tmp_path / "reach_rms_jerk.png").stat().st_size > 5000
    assert "mrad" in (tmp_path / "reach_tables.md").read_text()
