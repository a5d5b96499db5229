"""`pi05 bench latency`; faults: another scenario measured than named, wrong results accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy.tokenizer import small_config

from pi05_lab.bench import latency as latency_bench
from pi05_lab.bench.latency import FixedPrompt, LatencyBench, Scenario, scenarios
from pi05_lab.bench.latency_command import latency
from pi05_lab.bench.roofline import Peaks
from pi05_ros.cli import CommandError


@pytest.fixture(autouse=True)
def no_long_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_bench, "peaks_of", lambda *_: Peaks("CPU", 1e11, 1e10, "made up"))
    monkeypatch.setattr(latency_bench, "WARM_UPS", 1)


def bench(output: Path, **options: Any) -> tuple[int, dict[str, Any], str]:
    code = latency(**{"device": "cpu", "runs": 2, "output": output, **options})
    document = json.loads((output / "latency.json").read_text())
    return code, document, (output / "latency.md").read_text()


def test_modes_agree_and_are_timed_by_stage(tmp_path: Path) -> None:
    code, document, table = bench(
        tmp_path, ways="padded,eager", cameras="2", tokens="40", steps="3,2"
    )
    assert code == 0
    rows = document["rows"]
    assert [(r["way"], r["cameras"], r["tokens"], r["num_steps"]) for r in rows] == [
        ("padded", 2, 40, 3), ("eager", 2, 40, 3), ("eager", 2, 40, 2),
    ]  # fmt: skip
    for row in rows:
        assert list(row["stages_p50_ms"]) == [
            "upload", "resize", "prompt", "vision", "prefix", "denoise", "download", "postprocess"
        ]  # fmt: skip
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert sum(row["stages_p50_ms"].values()) < 1.5 * row["p99_ms"]
        assert row["max_action_difference"] < 1e-4 and row["runs"] == 2
    assert rows[0]["max_action_difference"] > 0 or rows[1]["max_action_difference"] == 0
    assert table.count("| padded, float32 | 2c 40t 3s |") == 2
    assert "torch" in document["machine"]


def test_actions_far_from_the_reference_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(latency_bench.PARITY_BOUNDS, torch.bfloat16, 1e-9)
    code, document, _ = bench(
        tmp_path, ways="eager", cameras="1", tokens="32", steps="2", dtype="bfloat16"
    )
    assert code == 1
    assert "more than 1e-09" in capsys.readouterr().out
    assert document["rows"][0]["max_action_difference"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": "fast"}, "unknown ways"),
        ({"cameras": "4"}, "cameras must be 1 to 3"),
        ({"tokens": "0"}, "tokens must be 1 to 96"),
        ({"steps": "ten"}, "'ten' is not a list"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"ways": "graphs"}, "needs a CUDA device"),
    ],
)
def test_impossible_measurements_are_refused(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    if torch.cuda.is_available() and "CUDA" in message:
        message = ""
    with pytest.raises(CommandError, match=message):
        bench(tmp_path, **options)


def test_one_size_varies_at_a_time() -> None:
    found = scenarios(small_config(), [3, 1], [96, 32], [10, 5])
    assert [str(one) for one in found] == ["3c 96t 10s", "1c 96t 10s", "3c 32t 10s", "3c 96t 5s"]


def test_a_fixed_prompt_has_its_length() -> None:
    tokens = FixedPrompt(small_config(), 40).encode("anything")
    assert tokens.mask.sum() == 40 and tokens.mask[:40].all()
    assert tokens.ids.max() < small_config().sizes.vocab


def test_a_full_size_policy_at_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: uninitialised parameters, which are NaN on a GPU."""
    monkeypatch.setattr(latency_bench, "PolicyConfig", lambda **_: small_config())
    measured = LatencyBench(latency_bench.FULL, torch.device("cpu"), "float32", runs=1)
    row = measured.measure("eager", Scenario(2, 32, 2))
    assert row.difference == 0 and row.holds and len(row.seconds) == 1
    policy = latency_bench.full_size_policy(
        torch.device("cpu"), "bfloat16", execution="eager", num_steps=2
    )
    actions = policy.infer(latency_bench.observe(policy, 3)).actions
    assert np.isfinite(actions).all() and np.abs(actions).max() > 0.1
