"""Every execution gives the eager actions; CUDA graphs are simulated where there is no GPU.

Faults: a value that a capture fixed, padding that is attended to, memory that a replay misses, an
operation that a CUDA graph cannot hold, host time taken for the device's.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_capture import OperationLog, SimulatedCapture  # type: ignore[import-not-found]
from tiny_network import (  # type: ignore[import-not-found]
    assert_same,
    inputs,
    sampled,
    tiny,
    tiny_network,
)
from torch._dynamo.testing import CompileCounterWithBackend

from pi05_ros.executor import InferenceExecutor
from pi05_ros.policy import inference
from pi05_ros.policy.guidance import Guidance, PrefixGuidance
from pi05_ros.policy.inference import (
    WARM_UPS,
    CudaGraphCapture,
    EagerSampler,
    GraphSampler,
    SampleInputs,
    StageClock,
    choose_execution,
    compile_network,
    fix_cuda_kernels,
    make_sampler,
    own_stream,
    run_directly,
)
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.policy import Policy

STEPS = 2
BUCKETS = (8, 16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=["pi05", "pi0"])
def either(request: pytest.FixtureRequest) -> Pi0:
    return tiny_network(request.param)


@pytest.fixture
def model() -> Pi0:
    return tiny_network("pi05")


# Samplers


def guided(given: SampleInputs, model: Pi0, method: str) -> SampleInputs:
    target = torch.randn(1, 6, model.config.max_action_dim, generator=torch.manual_seed(9))
    settings = Guidance(method=method, max_weight=5.0)
    guidance = PrefixGuidance.make(settings, target, 2, model.config.horizon, 4)
    return replace(given, guidance=guidance)


@pytest.mark.parametrize("simulated", [True, False])
def test_any_order_of_inputs_gives_the_eager_actions(either: Pi0, simulated: bool) -> None:
    """Fault: a replay with the images, prompt, state, noise or guidance of another call."""
    eager = EagerSampler(either, STEPS)
    capture = SimulatedCapture() if simulated else run_directly
    sampler = GraphSampler(either, STEPS, capture, BUCKETS)
    scenarios = [
        inputs(either, 0, (True, True, True), 5),
        inputs(either, 1, (True, True, True), 5),
        guided(inputs(either, 2, (True, True, True), 7), either, "identity"),
        inputs(either, 3, (True, True, True), 8),
        inputs(either, 4, (True, False, True), 8),
        inputs(either, 5, (False, True, True), 9),
        inputs(either, 6, (False, False, True), 24),
        inputs(either, 7, (True, True, True), 5),
        inputs(either, 0, (False, False, False), 6),
        guided(inputs(either, 8, (True, False, False), 20), either, "identity"),
        inputs(either, 8, (True, False, False), 20),
    ]
    results = [sampled(sampler, given) for given in scenarios]
    for given, result in zip(scenarios, results, strict=True):
        assert_same(result, sampled(eager, given))
    assert (results[-1] - results[-2]).abs().max() > 0.01, "guidance had no effect"
    assert (results[0] - results[1]).abs().max() > 0.1


@pytest.mark.parametrize("method", ["vjp", "trained"])
def test_guidance_outside_graphs(model: Pi0, method: str) -> None:
    """Fault: guidance that differentiates inference-mode tensors, or is left out."""
    eager = EagerSampler(model, STEPS)
    sampler = GraphSampler(model, STEPS, SimulatedCapture(), BUCKETS)
    given = guided(inputs(model, 0, (True, True, False), 6), model, method)
    assert_same(sampled(sampler, given), sampled(eager, given))
    free = replace(given, guidance=None)
    assert_same(sampled(sampler, free), sampled(eager, free))


def test_everything_is_captured_in_advance(either: Pi0) -> None:
    """Fault: a graph captured while the robot waits for a chunk."""
    capture = SimulatedCapture()
    sampler = GraphSampler(either, STEPS, capture, BUCKETS)
    sampler.prepare([2, 3])
    assert sampler.buckets == (8, 16, 24)
    # a vision encoder per number of cameras, a prefix and a denoising loop per bucket
    assert capture.count == 2 * (1 + 2 * 3)
    for length in (1, 8, 9, 24):
        sampled(sampler, inputs(either, 0, (True, True, True), length))
        sampled(sampler, inputs(either, 0, (True, False, True), length))
    assert capture.count == 14


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_captured_operations_stay_on_the_device(kind: str) -> None:
    """Fault: a constant from the CPU, or a size that depends on data: no CUDA graph holds them.

    The meta device has shapes and no data.
    """
    with torch.device("meta"), torch.no_grad():
        model = Pi0(tiny(kind)).eval()
        config = model.config
        images = torch.zeros(1, 2, 3, 28, 28)
        seen, masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        noise = torch.zeros(1, config.horizon, config.max_action_dim)
        state = None if model.adaptive else torch.zeros(1, config.max_state_dim)
        features = model.schedule(STEPS).features[:1]
    with torch.no_grad(), OperationLog(device="meta") as log:
        prefix = model.prefill(model.embed_images(images), seen, tokens, masks)
        velocity = model.denoise_step(prefix, noise, features, state)
    assert velocity.shape == noise.shape
    assert len(log.operations) > 50


def test_the_simulation_refuses_what_a_graph_cannot_hold(model: Pi0) -> None:
    with pytest.raises(AssertionError, match="synchronises"), OperationLog():
        torch.ones(2)[torch.tensor([True, False])]
    with pytest.raises(AssertionError, match="synchronises"), OperationLog():
        bool(torch.ones(2).all())


# Executions


@pytest.mark.parametrize("execution", ["auto", "eager"])
def test_a_cpu_runs_eagerly(model: Pi0, execution: str) -> None:
    sampler = make_sampler(model, 4, execution, cameras=3)
    assert isinstance(sampler, EagerSampler) and len(sampler.schedule.times) == 4


def test_an_unavailable_execution_is_refused(model: Pi0) -> None:
    with pytest.raises(ValueError, match="graphs, compile, not 'fast'"):
        make_sampler(model, 4, "fast", cameras=3)
    with pytest.raises(ValueError, match='needs a CUDA device; use "eager" or "compile"'):
        make_sampler(model, 4, "graphs", cameras=3)
    with pytest.raises(ValueError, match="num_steps must be at least 1, not 0"):
        make_sampler(model, 0, "eager", cameras=3)


def test_compiled_passes_give_the_same_actions(model: Pi0, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a pass that cannot be compiled as a whole, or is left out.

    With `aot_eager`, which traces everything and leaves the kernels unchanged: seconds, not
    minutes.
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
    assert isinstance(sampler, GraphSampler)
    assert compiled == ["prefix", "suffix", "forward"]
    assert_same(sampled(sampler, given), expected[0])
    assert_same(sampled(sampler, other), expected[1])


@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_dropped_policy_frees_its_weights(
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


def test_layers_share_compiled_kernels(model: Pi0, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert_same(sampled(GraphSampler(model, 2, run_directly, [24]), given), expected)
    # vision layer, both experts' two halves, the last layer's keys and values
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
def test_fp8_on_a_gpu_uses_compiled_kernels(
    execution: str, on_cuda: bool, fp8: bool, chosen: str
) -> None:
    """Fault: fp8 as a chain of small kernels, slower than bfloat16."""
    assert choose_execution(execution, on_cuda, fp8) == chosen


@pytest.mark.parametrize("execution", ["eager", "graphs"])
def test_fp8_without_compiled_kernels_is_refused_on_a_gpu(execution: str) -> None:
    with pytest.raises(ValueError, match=f'slower than bfloat16 with execution "{execution}"'):
        choose_execution(execution, on_cuda=True, fp8=True)


def test_kernels_on_a_gpu_do_not_depend_on_torchs_version() -> None:
    """Faults: patches in TF32; attention without a plan in one version of cuDNN."""
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


# Streams and CUDA graphs


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls to torch.cuda; `torch.cuda.graph` keeps its own signature."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = str(name)

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    signature = inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        given = signature.bind(None, *args, **kwargs).arguments
        calls.append(f"capture on {given['stream'].name}, {given['capture_error_mode']}")
        assert given["pool"] == "pool"
        yield
        calls.append("captured")

    @contextlib.contextmanager
    def stream(on: Stream) -> Iterator[None]:
        calls.append(f"on {on.name}")
        yield

    names = iter(["side", "side 2", "side 3", "side 4"])
    for name, stand_in in (
        ("Stream", lambda _: Stream(next(names))),
        ("current_stream", lambda _: Stream("main")),
        ("stream", stream),
        ("CUDAGraph", Graph),
        ("graph", graph),
        ("graph_pool_handle", lambda: "pool"),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return calls


def test_a_graph_is_warmed_up_captured_once_and_replayed(cuda_calls: list[str]) -> None:
    """Fault: a capture of the first run, when libraries still allocate; a missing wait."""
    capture = CudaGraphCapture(CUDA)
    runs = 0

    def run() -> int:
        nonlocal runs
        runs += 1
        cuda_calls.append("run")
        return runs

    captured = capture(run)
    assert cuda_calls == [
        "side waits for main", "on side", *["run"] * WARM_UPS, "main waits for side",
        "capture on side, thread_local", "run", "captured",
    ]  # fmt: skip
    assert captured.outputs == captured.replay() == runs == WARM_UPS + 1
    assert cuda_calls[-1] == "replay"


def test_all_graphs_are_captured_on_one_stream(cuda_calls: list[str]) -> None:
    """Fault: a stream for each graph, between which the pool shares no memory."""
    capture = CudaGraphCapture(CUDA)
    for _ in range(3):
        capture(lambda: 0)
    assert cuda_calls.count("capture on side, thread_local") == 3


def test_a_direct_replay_runs_again() -> None:
    given = torch.zeros(2)
    captured = run_directly(lambda: given + 1)
    given += 5
    assert captured.outputs.tolist() == [1, 1]
    assert captured.replay().tolist() == captured.outputs.tolist() == [6, 6]


def test_the_own_stream_waits_for_the_weights(cuda_calls: list[str]) -> None:
    """Fault: time features computed once from weights that are still uploading."""
    own_stream(CUDA)
    assert cuda_calls == ["side waits for main"]
    assert own_stream(CPU) is contextlib.nullcontext


# Stage times


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's clock; a test appends to it."""
    shown = [100.0]
    monkeypatch.setattr(inference.time, "perf_counter", lambda: shown[-1])
    return shown


class Event:
    """An event of a device that is far behind the host."""

    times_ms: Iterator[float]
    waited_for: Event | None = None
    """The host has waited for it; the device has done everything before it, and nothing after."""

    def record(self) -> None:
        self.time_ms = next(Event.times_ms)

    def synchronize(self) -> None:
        Event.waited_for = self

    def elapsed_time(self, later: Event) -> float:
        if Event.waited_for is None or later.time_ms > Event.waited_for.time_ms:
            raise RuntimeError("device not ready")
        return later.time_ms - self.time_ms


def test_on_a_cpu_all_stages_are_consecutive(seconds: list[float]) -> None:
    clock = StageClock(CPU)
    for stage, end_s in (("vision", 100.5), ("prompt", 100.75), ("vision", 101.0)):
        seconds.append(end_s)
        (clock.mark_host if stage == "prompt" else clock.mark)(stage)
    seconds.append(107.0)
    clock.skip_host()
    seconds.append(107.5)
    clock.mark_host("postprocess")
    timings_s = clock.timings_s()
    assert timings_s == {"vision": 0.75, "prompt": 0.25, "postprocess": 0.5}
    assert list(timings_s) == ["vision", "prompt", "postprocess"]


def test_gpu_stages_are_timed_by_events(seconds: list[float]) -> None:
    """Fault: an event queried before the device has reached it."""
    Event.times_ms = iter([10.0, 14.0, 15.5])
    clock = StageClock(CUDA, Event)
    seconds.append(100.001)
    clock.mark("vision")
    clock.mark_host("prompt")
    clock.mark("prefix")
    assert clock.timings_s() == pytest.approx({"vision": 4e-3, "prompt": 1e-3, "prefix": 1.5e-3})


def test_a_real_clock() -> None:
    clock = StageClock(CPU)
    time.sleep(2e-3)
    clock.mark("sleep")
    assert 2e-3 <= clock.timings_s()["sleep"] < 1.0
