"""`pi05 bench latency`; faults: another case measured than named, a wrong result called fast."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pi05_lab.bench import latency as latency_bench
from pi05_lab.bench import latency_command
from pi05_lab.bench.latency import Case, FixedPrompt, LatencyBench, cases
from pi05_lab.bench.roofline import Peaks
from pi05_lab.training.small_tokenizer import small_config


@pytest.fixture(autouse=True)
def no_long_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_bench, "peaks_of", lambda *_: Peaks("CPU", 1e11, 1e10, "made up"))
    monkeypatch.setattr(latency_bench, "WARM_UPS", 1)


def bench(output: Path, *arguments: str) -> tuple[int, dict[str, object], str]:
    parser = argparse.ArgumentParser()
    latency_command.add_arguments(parser)
    options = ["--device", "cpu", "--runs", "2", "--output", str(output), *arguments]
    code = latency_command.run(parser.parse_args(options))
    if not (output / "latency.json").is_file():
        return code, {}, ""
    return (
        code,
        json.loads((output / "latency.json").read_text()),
        (output / "latency.md").read_text(),
    )


def test_the_ways_agree_and_are_timed_by_stage(tmp_path: Path) -> None:
    code, document, table = bench(
        tmp_path, "--ways", "padded,eager", "--cameras", "2", "--tokens", "40", "--steps", "3,2"
    )
    assert code == 0
    rows = document["rows"]
    assert isinstance(rows, list)
    assert [(r["way"], r["cameras"], r["tokens"], r["num_steps"]) for r in rows] == [
        ("padded", 2, 40, 3), ("eager", 2, 40, 3), ("eager", 2, 40, 2),
    ]  # fmt: skip
    for row in rows:
        assert set(row["stages_p50_ms"]) == set(latency_command.STAGES)
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert sum(row["stages_p50_ms"].values()) < 1.5 * row["p99_ms"]
        assert row["max_action_difference"] < 1e-4 and row["runs"] == 2
    assert rows[0]["max_action_difference"] > 0 or rows[1]["max_action_difference"] == 0
    assert table.count("| padded, float32 | 2c 40t 3s |") == 2
    assert "torch" in document["machine"]  # type: ignore[operator]


def test_actions_that_are_too_far_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(latency_bench.PARITY_BOUNDS, torch.bfloat16, 1e-9)
    code, document, _ = bench(
        tmp_path, "--ways", "eager", "--cameras", "1", "--tokens", "32", "--steps", "2",
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert code == 1
    assert "more than 1e-09" in capsys.readouterr().out
    assert document["rows"][0]["max_action_difference"] < 0.5  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "fast"], "unknown ways"),
        (["--cameras", "4"], "cameras must be 1 to 3"),
        (["--tokens", "0"], "tokens must be 1 to 96"),
        (["--steps", "ten"], "'ten' is no list"),
        (["--device", "cuda"], "no CUDA device"),
        (["--ways", "graphs"], "needs a CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if torch.cuda.is_available() and "CUDA" in message:
        message = ""
    code, _, _ = bench(tmp_path, *arguments)
    assert code == 1 and message in capsys.readouterr().out


def test_one_thing_is_changed_at_a_time() -> None:
    found = cases(small_config(), [3, 1], [96, 32], [10, 5])
    assert found == [Case(3, 96, 10), Case(1, 96, 10), Case(3, 32, 10), Case(3, 96, 5)]


def test_a_fixed_prompt_has_its_length() -> None:
    tokens = FixedPrompt(small_config(), 40).encode("anything")
    assert tokens.mask.sum() == 40 and tokens.mask[:40].all()
    assert tokens.ids.max() < small_config().sizes.vocab


def test_a_full_size_policy_runs_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: parameters left as the memory was, which a GPU would show as NaN."""
    monkeypatch.setattr(latency_bench, "PolicyConfig", lambda **_: small_config())
    measured = LatencyBench(latency_bench.FULL, torch.device("cpu"), "float32", runs=1)
    row = measured.measure("eager", Case(2, 32, 2))
    assert row.difference == 0 and row.holds and len(row.seconds) == 1
    policy = latency_bench.full_size_policy(
        Case(3, 32, 2), torch.device("cpu"), "bfloat16", "eager"
    )
    actions = policy.infer(latency_bench.observe(policy, 3)).actions
    assert np.isfinite(actions).all() and np.abs(actions).max() > 0.1
