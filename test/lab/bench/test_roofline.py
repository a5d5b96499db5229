"""The least a chunk costs; fault: a floor that real programs go below, or one that is too kind."""

from __future__ import annotations

import pytest
import torch
from small_policy.tokenizer import small_config

from pi05_lab.bench import roofline
from pi05_lab.bench.roofline import Cost, Peaks, peaks_of, stage_costs
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.model import Pi0


def test_full_size_costs_what_was_counted_by_hand() -> None:
    """3 cameras, 200 tokens, 10 steps: 0.66 + 3.76 + 0.39 TFLOP, and 7.6 to 11 GB in bfloat16.

    The prefix is 3.98 TFLOP where its last layer is computed whole.
    """
    costs = stage_costs(PolicyConfig(), 3, 200, 10, bytes_per_value=2)
    assert costs["vision"].flop == pytest.approx(0.661e12, rel=0.01)
    assert costs["prefix"].flop == pytest.approx(3.76e12, rel=0.01)
    assert costs["denoise"].flop == pytest.approx(0.386e12, rel=0.01)
    assert costs["vision"].bytes == pytest.approx(0.83e9, rel=0.02)
    assert costs["prefix"].bytes == pytest.approx(3.75e9, rel=0.02)
    assert costs["denoise"].bytes == pytest.approx(6.23e9 + 0.18e9, rel=0.01)


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_weights_are_the_networks(kind: str) -> None:
    """Bytes of vision and denoise against the parameters that those stages read."""
    config = PolicyConfig(kind=kind)
    with torch.device("meta"):
        model = Pi0(config)
    costs = stage_costs(config, 1, 200, 1, bytes_per_value=1)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    encoder = sum(sizes[name] for name in sizes if name.startswith("vision."))
    assert costs["vision"].bytes == pytest.approx(encoder, rel=0.002)
    layers = sum(sizes[name] for name in sizes if name.startswith("experts.action.layers."))
    cache = 2 * (256 + 200) * 256 * 18
    assert costs["denoise"].bytes == pytest.approx(layers + cache, rel=1e-3)


def test_costs_grow_with_what_is_asked_for() -> None:
    base = stage_costs(small_config(), 1, 32, 5, 4)
    more = stage_costs(small_config(), 2, 32, 10, 4)
    assert more["vision"].flop == 2 * base["vision"].flop
    assert more["vision"].bytes == base["vision"].bytes
    assert more["denoise"].flop > 2 * base["denoise"].flop


def test_the_floor_is_the_longer_of_arithmetic_and_traffic() -> None:
    peaks = Peaks("a device", 100.0, 10.0, "here")
    assert peaks.floor_s(Cost(50.0, 1.0)) == 0.5
    assert peaks.floor_s(Cost(50.0, 20.0)) == 2.0


def test_peaks_of_a_known_gpu_are_its_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    peaks = peaks_of(torch.device("cuda"), torch.bfloat16)
    assert (peaks.flop_per_s, peaks.bytes_per_s) == (989e12, 3.35e12)
    assert peaks.source == "data sheet"


def test_peaks_of_a_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0])
    monkeypatch.setattr(roofline, "_fastest_s", lambda run, device: next(seconds))
    peaks = peaks_of(torch.device("cpu"), torch.float32)
    assert peaks.flop_per_s == 2 * 1024**3
    assert peaks.bytes_per_s == 2 * 2**26 * 4 / 2.0
    assert peaks.source.startswith("measured, ")
