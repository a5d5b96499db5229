"""Ways to run the network; faults: a way that gives other actions, or one that isn't there."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_network import (  # type: ignore[import-not-found]
    assert_same,
    inputs,
    sampled,
    tiny_network,
)
from torch._dynamo.testing import CompileCounterWithBackend

from pi05_ros.executor import InferenceExecutor
from pi05_ros.policy.inference import (
    BucketSampler,
    DirectRecorder,
    EagerSampler,
    choose_execution,
    compile_network,
    fix_cuda_kernels,
    make_sampler,
    own_stream,
)
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.policy import Policy


@pytest.fixture
def model() -> Pi0:
    return tiny_network("pi05")


@pytest.mark.parametrize("execution", ["auto", "eager"])
def test_a_cpu_runs_operation_by_operation(model: Pi0, execution: str) -> None:
    sampler = make_sampler(model, 4, execution, cameras=3)
    assert isinstance(sampler, EagerSampler) and sampler.num_steps == 4


def test_what_is_not_there_is_refused(model: Pi0) -> None:
    with pytest.raises(ValueError, match="graphs, compile, not 'fast'"):
        make_sampler(model, 4, "fast", cameras=3)
    with pytest.raises(ValueError, match='needs a CUDA device; use "eager" or "compile"'):
        make_sampler(model, 4, "graphs", cameras=3)
    with pytest.raises(ValueError, match="num_steps must be at least 1, not 0"):
        make_sampler(model, 0, "eager", cameras=3)


def test_compiled_passes_give_the_same_actions(model: Pi0, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a pass that cannot be compiled as a whole, or is left out.

    With `aot_eager`, which traces all and leaves the kernels as they are: seconds, not minutes.
    """
    real, compiled = torch.compile, []

    def compile_(run: Any, **options: Any) -> Any:
        compiled.append(run.__name__)
        assert options == {"dynamic": False, "fullgraph": True}
        return real(run, backend="aot_eager", **options)

    given = inputs(model, 0, (True, True, True), 6)
    other = inputs(model, 1, (True, True, True), 7)
    expected = [sampled(EagerSampler(model, 2), which) for which in (given, other)]
    monkeypatch.setattr(torch, "compile", compile_)
    sampler = make_sampler(model, 2, "compile", cameras=3)
    assert isinstance(sampler, BucketSampler)
    assert compiled == ["prefix", "suffix", "forward"]
    assert_same(sampled(sampler, given), expected[0])
    assert_same(sampled(sampler, other), expected[1])


@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_policy_that_is_dropped_frees_its_weights(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, execution: str, by_layer: bool
) -> None:
    """Fault: model → compiled bound method → model, 7 GB that stay when the next is loaded."""
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda *given, **by: run(*given, **by))
    policies = [Policy.from_pretrained(small_folder, "aloha", "cpu", num_steps=1,
                                       execution=execution)]  # fmt: skip
    if execution == "compile" and by_layer:
        compile_network(policies[0].model, by_layer=True)
    model = weakref.ref(policies[0].model)
    executor = InferenceExecutor(policies.pop, warmup_runs=1)
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda: 0)
    try:
        executor.start()
        assert executor.wait_ready(60.0).horizon == 50
        assert executor.stop(60.0)
        assert model() is None
    finally:
        gc.enable()


def test_layers_share_what_is_compiled(model: Pi0, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: kernels made for each of 18 layers, and an error at the 65th."""
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile",
        lambda run, mode, **options: real(run, backend=counter, **options),  # type: ignore
    )  # fmt: skip
    given = inputs(model, 0, (True, True, True), 6)
    expected = sampled(EagerSampler(model, 2), given)
    compile_network(model, by_layer=True)
    assert_same(sampled(BucketSampler(model, 2, DirectRecorder(), [24]), given), expected)
    # tower, both experts' two functions, keys and values alone
    assert counter.frame_count == 6


def test_fp8_is_near(model: Pi0) -> None:
    given = inputs(model, 0, (True, True, True), 6)
    expected = sampled(EagerSampler(model, 2), given)
    got = sampled(make_sampler(model, 2, "eager", cameras=3, fp8=True), given)
    assert 0 < (got - expected).abs().max() < 0.1
    assert np.isfinite(got.numpy()).all()


@pytest.mark.parametrize(
    ("execution", "on_cuda", "fp8", "chosen"),
    [
        ("auto", True, False, "graphs"),
        ("auto", True, True, "compile"),
        ("auto", False, True, "eager"),
        ("compile", True, True, "compile"),
        ("eager", False, True, "eager"),
    ],
)
def test_fp8_on_a_gpu_comes_with_compiled_kernels(
    execution: str, on_cuda: bool, fp8: bool, chosen: str
) -> None:
    """Fault: fp8 as a chain of small kernels, slower than bfloat16."""
    assert choose_execution(execution, on_cuda, fp8) == chosen


@pytest.mark.parametrize("execution", ["eager", "graphs"])
def test_fp8_without_compiled_kernels_is_refused_on_a_gpu(execution: str) -> None:
    with pytest.raises(ValueError, match=f'slower than bfloat16 with execution "{execution}"'):
        choose_execution(execution, on_cuda=True, fp8=True)


def test_kernels_on_a_gpu_do_not_depend_on_torchs_version() -> None:
    """Faults: patches in TF32; attention that has no plan in one version of cuDNN."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(True)
        fix_cuda_kernels()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.backends.cuda.enable_cudnn_sdp(before[1])


def test_a_stream_of_ones_own_begins_behind_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins: time features made once and for all from weights that are still under way."""
    waited: list[object] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: object) -> None:
            waited.append(other)

    loading = object()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: loading)
    own_stream(torch.device("cuda"))
    assert waited == [loading]


def test_a_cpu_has_no_streams() -> None:
    assert own_stream(torch.device("cpu")) is contextlib.nullcontext
