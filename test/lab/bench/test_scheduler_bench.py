"""The obstacle task. Faults pinned: a policy with a wrong Jacobian, episodes that differ with the
same seed, a task that no scheduler or every scheduler solves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pi05_lab.bench import toy_task as scheduler_bench
from pi05_lab.bench.report import OBSTACLE_MEASURES, markdown, summarise
from pi05_lab.bench.toy_task import DELAYS, VARIANTS, measure_cost, run_episode
from pi05_lab.bench.two_mode_policy import (
    HORIZON,
    OBSTACLE,
    OBSTACLE_RADIUS_M,
    SCALE_M,
    SPREAD_M,
    VECTORS,
    TwoModePolicy,
    _Flow,
    plans,
)
from pi05_ros.cli import main
from pi05_ros.policy.guidance import Guidance
from pi05_ros.types import Observation

BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.mark.parametrize("time", [0.9, 0.5, 0.2])
def test_the_flows_jacobian_by_finite_differences(time: float) -> None:
    means, shares = plans(np.array([0.2, 0.003]), "goal")
    flow = _Flow(VECTORS.T @ means / SCALE_M, np.log(shares))
    rng = np.random.default_rng(0)
    x, vector, direction = rng.normal(size=(3, HORIZON, 2))
    x = time * x + (1 - time) * VECTORS.T @ means[0] / SCALE_M * 0.1
    ends = [flow.estimate(x + step * direction, time)[0] for step in (1e-5, -1e-5)]
    expected = ((ends[0] - ends[1]) / 2e-5 * vector).sum()
    product = flow.estimate(x, time)[1](vector)
    assert (product * direction).sum() == pytest.approx(expected, abs=1e-6)


def test_chunks_are_samples_of_the_two_modes() -> None:
    position = np.array([0.45, 0.0])
    means, _ = plans(position, "goal")
    policy = TwoModePolicy(Guidance(), np.random.default_rng(0))
    sides = []
    for _ in range(30):
        actions = policy.infer(Observation({}, position, "goal", 0.0)).actions
        distances = np.linalg.norm(actions - means, axis=2).max(axis=1)
        assert distances.min() < 5 * SPREAD_M
        sides.append(int(distances.argmin()))
        assert np.linalg.norm(actions[0] - position) < 0.01
    assert 5 < sum(sides) < 25
    for mean in means:
        assert np.linalg.norm(mean - OBSTACLE, axis=1).min() > 1.5 * OBSTACLE_RADIUS_M


def test_an_episode_repeats_with_its_seed() -> None:
    first, second = (run_episode(BY_NAME["rtc"], DELAYS[-1], 3) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["temporal_ensemble", "rtc"])
@pytest.mark.parametrize("delay", DELAYS[:4], ids=lambda delay: delay.name)
def test_the_default_and_rtc_arrive_without_a_stop(name: str, delay: scheduler_bench.Delay) -> None:
    for seed in range(2):
        episode = run_episode(BY_NAME[name], delay, seed)
        assert episode.success and episode.stall_s == 0
        assert episode.seam_jump < 0.015 and episode.largest_step < 0.03


def test_averaging_two_modes_can_fail() -> None:
    """Otherwise the task would not distinguish the methods."""
    episodes = [run_episode(BY_NAME["ensemble, no guard"], DELAYS[1], seed) for seed in range(8)]
    assert not all(episode.success for episode in episodes)


def test_sync_stalls_for_the_latency() -> None:
    short, long = (run_episode(BY_NAME["sync"], DELAYS[index], 0).stall_s for index in (1, 4))
    assert 0 < short < long


def test_the_command_writes_tables_figures_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_bench, "VARIANTS", VARIANTS[1:3])
    monkeypatch.setattr(scheduler_bench, "DELAYS", DELAYS[:2])
    cost = measure_cost(ticks=100)
    monkeypatch.setattr(scheduler_bench, "measure_cost", lambda: cost)
    arguments = ["--seeds", "2", "--workers", "1", "--output", str(tmp_path)]
    assert main(["bench", "scheduler", *arguments]) == 0
    metrics = json.loads((tmp_path / "scheduler_metrics.json").read_text())
    success = metrics["results"]["latest"]["0 ms"]["success"]
    assert 0 <= success["low"] <= success["mean"] <= success["high"] <= 100
    assert set(metrics["cost"]) == {"latest", "blend"}
    for measure in OBSTACLE_MEASURES:
        assert (tmp_path / f"scheduler_{measure.key}.png").stat().st_size > 5000
    table = (tmp_path / "scheduler_tables.md").read_text()
    assert "| latest |" in table and "50 ms" in table
    assert main(["bench", "scheduler", "--seeds", "0"]) == 2


def test_summaries_have_their_interval() -> None:
    episodes = [run_episode(BY_NAME["latest"], DELAYS[0], seed) for seed in range(3)]
    results = summarise(episodes, OBSTACLE_MEASURES[1:2])
    assert list(results) == ["latest"]
    figure = results["latest"][DELAYS[0].name]["time_s"]
    assert figure.low <= figure.mean <= figure.high
    assert "±" in markdown(results, OBSTACLE_MEASURES[1:2])
