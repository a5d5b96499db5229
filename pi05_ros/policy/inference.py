"""Run the network: eagerly, or as CUDA graphs with static buffers, with compiled kernels or in fp8.

`EagerSampler` runs operation by operation. `GraphSampler` captures three CUDA graphs per number of
cameras and prompt-length bucket: vision encoder, prefix and denoising. Missing cameras are dropped
and prompts padded to the next bucket; padding is masked and does not advance positions, so the
actions equal the eager ones.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pi05_ros.policy.guidance import PrefixGuidance, identity_step
from pi05_ros.policy.model import Pi0, Prefix, Schedule, Velocity, euler_step, integrate
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.quantize import quantize_prefix

Mark = Callable[[str], None]
"""Called with a stage's name at the end of the stage."""


def no_mark(stage: str) -> None:
    """No-op stage callback."""


class StageClock:
    """Times the consecutive stages of one inference.

    GPU stages are timed with CUDA events, host stages with perf_counter. Both run concurrently, so
    the sum of all stages can exceed the whole.
    """

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        """Start now.

        Args:
            device: where the stages of `mark` run.
            make_event: makes a CUDA event with timing; by default used on CUDA alone.
        """
        if make_event is None and device.type == "cuda":
            make_event = partial(torch.cuda.Event, enable_timing=True)
        self._make_event = make_event
        self._host_s = time.perf_counter()
        self._events: list[tuple[str, Any]] = []
        self._timings_s: dict[str, float] = {}
        self._record_event("")

    def mark(self, stage: str) -> None:
        """End of a device stage; it began at the previous mark."""
        if self._make_event is None:
            self.mark_host(stage)
        else:
            self._timings_s.setdefault(stage, 0.0)
            self._record_event(stage)

    def mark_host(self, stage: str) -> None:
        """End of a host stage; it began at the previous host mark."""
        now_s = time.perf_counter()
        self._timings_s[stage] = self._timings_s.get(stage, 0.0) + now_s - self._host_s
        self._host_s = now_s

    def skip_host(self) -> None:
        """Leave the host's time since the last mark out of all stages."""
        self._host_s = time.perf_counter()

    def timings_s(self) -> dict[str, float]:
        """Seconds per stage, in order. Waits until the device has finished the last one."""
        timings_s = dict(self._timings_s)
        if self._events:
            self._events[-1][1].synchronize()
        for (_, before), (stage, event) in zip(self._events, self._events[1:], strict=False):
            timings_s[stage] = before.elapsed_time(event) * 1e-3
        return timings_s

    def _record_event(self, stage: str) -> None:
        if self._make_event is not None:
            event = self._make_event()
            event.record()
            self._events.append((stage, event))


@dataclass(frozen=True)
class SampleInputs:
    """One observation, prepared for the network."""

    images: Tensor
    """[1, n_cameras, 3, side, side] in [-1, 1] on the device, in the network's order."""
    present: tuple[bool, ...]
    """[n_cameras] whether there is an image."""
    tokens: Tokens
    noise: Tensor
    """[1, H, D] on the CPU."""
    state: Tensor | None = None
    """[1, max_state_dim] on the CPU, π0 alone."""
    guidance: PrefixGuidance | None = None
    """On the CPU."""

    @property
    def cameras(self) -> list[int]:
        """Indices of the images that are present."""
        return [index for index, there in enumerate(self.present) if there]


class Sampler(Protocol):
    """Runs the network on its device."""

    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """[1, H, D] normalised actions, float32, on the device; valid until the next call.

        Ends the stages "vision", "prefix" and "denoise".
        """


class EagerSampler:
    """Operation by operation, in the shapes of the inputs."""

    def __init__(self, model: Pi0, num_steps: int) -> None:
        """`model`'s weights must not change afterwards."""
        self._model = model
        self.schedule = model.schedule(num_steps)

    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        model, device, guidance = self._model, self._model.device, inputs.guidance
        # vjp differentiates, which inference-mode tensors do not support
        differentiates = guidance is not None and guidance.method == "vjp"
        with torch.inference_mode(not differentiates), torch.no_grad():
            cameras = inputs.cameras
            tokens = torch.from_numpy(inputs.tokens.ids[inputs.tokens.mask])[None].to(device)
            features = model.embed_images(inputs.images[:, cameras])
            mark("vision")
            seen = torch.ones((1, len(cameras)), dtype=torch.bool, device=device)
            token_masks = torch.ones_like(tokens, dtype=torch.bool)
            prefix = model.prefill(features, seen, tokens, token_masks, masked=False)
            mark("prefix")
            state = None if inputs.state is None else inputs.state.to(device, copy=True)
            step = euler_step if guidance is None else guidance.to(device).step
            velocity = partial(model.denoise_step, prefix, state=state)
            actions = integrate(velocity, inputs.noise.to(device), self.schedule, step)
        mark("denoise")
        return actions


T = TypeVar("T")

WARM_UPS = 2
"""Runs before a capture: libraries choose kernels and allocate their workspaces in the first."""


class Captured(Generic[T]):
    """Static outputs of a captured function; `replay` recomputes them from its static inputs."""

    def __init__(self, outputs: T, run: Callable[[], T | None]) -> None:
        """`run` returns new outputs, or None if it writes them in place."""
        self.outputs = outputs
        self._run = run

    def replay(self) -> T:
        new = self._run()
        if new is not None:
            self.outputs = new
        return self.outputs


class Capture(Protocol):
    """Captures a function of static tensors that never synchronises with the device."""

    def __call__(self, run: Callable[[], T]) -> Captured[T]: ...


def run_directly(run: Callable[[], T]) -> Captured[T]:
    """Capture nothing: a replay runs the function. For compiled code on a CPU."""
    return Captured(run(), run)


class CudaGraphCapture:
    """Captures CUDA graphs that share one memory pool.

    All captures use one side stream, because the allocator keeps free memory by stream. Replays
    follow one another, so each reuses the others' memory, except for outputs in use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], T]) -> Captured[T]:
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile: only this thread's calls may fail the capture
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            outputs = run()
        return Captured(outputs, graph.replay)


TEXT_BUCKETS = (32, 64, 128, 200)
"""Prompt lengths in tokens; the network's own is always one. Multiples of 8 suit the kernels."""


class StaticBuffer:
    """A tensor at a fixed address, filled through pinned memory if it is on a GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True) if on_gpu else self.tensor

    def fill(self, values: Tensor) -> None:
        """Copy a CPU tensor of the same shape; the caller may change it afterwards.

        The previous inference must be over: its upload reads the pinned memory.
        """
        self._host.copy_(values)
        if self._host is not self.tensor:
            self.tensor.copy_(self._host, non_blocking=True)


class StaticGuidance:
    """Identity guidance in static buffers, so one graph serves guided and unguided sampling."""

    def __init__(
        self, times: tuple[float, ...], shape: tuple[int, ...], device: torch.device
    ) -> None:
        self._times = times
        self._target = StaticBuffer(shape, torch.float32, device)
        self._pulls = StaticBuffer((len(times), *shape), torch.float32, device)
        self._active = False

    def fill(self, guidance: PrefixGuidance | None) -> None:
        """Without guidance every pull is 0, which is exactly the unguided step."""
        if guidance is not None:
            self._target.fill(guidance.target)
            self._pulls.fill(torch.stack([guidance.pull(time) for time in self._times]))
        elif self._active:
            self._pulls.fill(torch.zeros_like(self._pulls.tensor, device="cpu"))
        self._active = guidance is not None

    def step(self, velocity: Velocity, x_t: Tensor, schedule: Schedule, index: int) -> Tensor:
        pull = self._pulls.tensor[index]
        return identity_step(velocity, x_t, schedule, index, self._target.tensor, pull)


class VisionGraph(NamedTuple):
    """The vision encoder for one number of cameras."""

    images: Tensor
    features: Captured[Tensor]


class PrefixGraphs(NamedTuple):
    """Everything after the vision encoder, for one number of cameras and prompt length."""

    tokens: StaticBuffer
    token_masks: StaticBuffer
    prefix: Captured[Prefix]
    actions: Captured[Tensor]


class GraphSampler:
    """A `Sampler` with graphs per number of cameras and prompt-length bucket."""

    def __init__(
        self, model: Pi0, num_steps: int, capture: Capture, buckets: Iterable[int] = TEXT_BUCKETS
    ) -> None:
        """Allocate the buffers; `prepare` or the first use captures.

        Args:
            model: its weights must neither change nor move afterwards.
            num_steps: Euler steps.
            capture: for the model's device.
            buckets: prompt lengths.
        """
        config, device = model.config, model.device
        longest = config.token_length
        self.buckets = tuple(sorted({min(bucket, longest) for bucket in buckets} | {longest}))
        self._model = model
        self._capture = capture
        self._eager = EagerSampler(model, num_steps)
        self.schedule = model.schedule(num_steps)
        with torch.inference_mode(False):
            shape = (1, config.horizon, config.max_action_dim)
            self._noise = StaticBuffer(shape, torch.float32, device)
            self._guidance = StaticGuidance(self.schedule.times, shape, device)
            self._state = StaticBuffer((1, config.max_state_dim), torch.float32, device)
        self._vision: dict[int, VisionGraph] = {}
        self._graphs: dict[tuple[int, int], PrefixGraphs] = {}

    def prepare(self, cameras: Iterable[int]) -> None:
        """Capture every bucket for these numbers of cameras, so that no inference has to."""
        for count in cameras:
            for length in self.buckets:
                self._prefix_graphs(count, length)

    # code compiled in one mode would be compiled again for the other, see `_prefix_graphs`
    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """See `Sampler`. Without any image it runs eagerly."""
        cameras = inputs.cameras
        if not cameras:
            return self._eager.sample(inputs, mark)
        used = int(np.flatnonzero(inputs.tokens.mask).max(initial=0)) + 1
        length = next(bucket for bucket in self.buckets if bucket >= used)
        graphs = self._prefix_graphs(len(cameras), length)
        vision = self._vision[len(cameras)]
        graphs.tokens.fill(torch.from_numpy(inputs.tokens.ids[:length])[None])
        graphs.token_masks.fill(torch.from_numpy(inputs.tokens.mask[:length])[None])
        self._noise.fill(inputs.noise)
        if inputs.state is not None:
            self._state.fill(inputs.state)
        guidance = inputs.guidance
        # vjp differentiates and trained has a time per token: both denoise eagerly
        eager = guidance is not None and guidance.method != "identity"
        self._guidance.fill(None if eager else guidance)
        for row, index in enumerate(cameras):
            vision.images[:, row].copy_(inputs.images[:, index])
        vision.features.replay()
        mark("vision")
        prefix = graphs.prefix.replay()
        mark("prefix")
        if eager and guidance is not None:
            velocity = partial(self._model.denoise_step, prefix, state=self._state.tensor)
            step = guidance.to(self._model.device).step
            actions = integrate(velocity, self._noise.tensor, self.schedule, step)
        else:
            actions = graphs.actions.replay()
        mark("denoise")
        return actions

    # vjp differentiates through captured tensors, which inference mode would forbid
    @torch.inference_mode(False)
    @torch.no_grad()
    def _prefix_graphs(self, cameras: int, length: int) -> PrefixGraphs:
        """The graphs for a number of cameras and a prompt length, captured on first use."""
        if (cameras, length) in self._graphs:
            return self._graphs[cameras, length]
        # The captured functions hold no `self`: with it, a cycle would keep the weights in memory
        # when the policy is dropped.
        model, schedule, capture = self._model, self.schedule, self._capture
        noise, state, step = self._noise.tensor, self._state.tensor, self._guidance.step
        side, device = model.config.image_size, model.device
        if cameras not in self._vision:
            images = torch.zeros((1, cameras, 3, side, side), device=device)
            features = capture(partial(model.embed_images, images))
            self._vision[cameras] = VisionGraph(images, features)
        vision = self._vision[cameras]
        tokens = StaticBuffer((1, length), torch.int64, device)
        token_masks = StaticBuffer((1, length), torch.bool, device)
        token_masks.tensor[:, 0] = True  # a fully masked prompt has no softmax
        seen = torch.ones((1, cameras), dtype=torch.bool, device=device)

        def encode() -> Prefix:
            return model.prefill(vision.features.outputs, seen, tokens.tensor, token_masks.tensor)

        prefix = capture(encode)

        def denoise() -> Tensor:
            velocity = partial(model.denoise_step, prefix.outputs, state=state)
            return integrate(velocity, noise, schedule, step)

        graphs = PrefixGraphs(tokens, token_masks, prefix, capture(denoise))
        self._graphs[cameras, length] = graphs
        return graphs


EXECUTIONS = ("auto", "eager", "graphs", "compile")
"""auto: graphs on CUDA (compile with fp8), eager elsewhere; graphs: CUDA graphs per number of
cameras and prompt-length bucket; compile: kernels fused by torch.compile in these graphs, which
takes minutes at the first start."""

RECOMPILE_LIMIT = 64
"""Shapes of one function that torch.compile makes kernels for."""


def make_sampler(
    model: Pi0, num_steps: int, execution: str, cameras: int, fp8: bool = False
) -> Sampler:
    """Prepare a loaded network to run; call it on the thread that will run it.

    Args:
        model: on its device. `fp8` and "compile" change it in place.
        num_steps: Euler steps.
        execution: one of `EXECUTIONS`.
        cameras: of the robot; graphs are captured for 1 to this many images.
        fp8: run the language model's prefix pass in 8-bit floats.

    Raises:
        ValueError: an unknown execution, or one that the device does not support.
    """
    on_cuda = model.device.type == "cuda"
    execution = choose_execution(execution, on_cuda, fp8)
    if on_cuda:
        fix_cuda_kernels()
    if fp8:
        quantize_prefix(model)
    if execution == "eager":
        return EagerSampler(model, num_steps)
    if execution == "compile":
        compile_network(model, by_layer=on_cuda)
    capture: Capture = CudaGraphCapture(model.device) if on_cuda else run_directly
    sampler = GraphSampler(model, num_steps, capture)
    sampler.prepare(range(1, cameras + 1) if on_cuda else [cameras])
    return sampler


def choose_execution(execution: str, on_cuda: bool, fp8: bool) -> str:
    """One of "eager", "graphs" and "compile".

    Raises:
        ValueError: an unknown execution, one that the device does not support, or fp8 on a GPU
            without compiled kernels: rounding the activations takes longer than it saves then.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, not {execution!r}")
    if execution == "auto":
        if not on_cuda:
            return "eager"
        return "compile" if fp8 else "graphs"
    if execution == "graphs" and not on_cuda:
        raise ValueError('execution "graphs" needs a CUDA device; use "eager" or "compile"')
    if fp8 and on_cuda and execution != "compile":
        raise ValueError(
            f'fp8_prefix is slower than bfloat16 with execution "{execution}"; use "compile" or '
            '"auto", or leave fp8_prefix false'
        )
    return execution


def fix_cuda_kernels() -> None:
    """Process-wide settings that make the choice of kernels independent of torch's version.

    The only convolution, of the image patches, stays in float32: torch's default for convolutions
    is TF32. Attention takes the flash or memory-efficient kernel: cuDNN's, which newer versions
    prefer, fails without a fallback where it has no plan (PyTorch issue 140930).
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def compile_network(model: Pi0, by_layer: bool) -> None:
    """Replace the network's hot functions by compiled ones.

    By layer, all layers of an expert share their kernels: for deep networks, where graphs remove
    the cost of the calls between layers. Otherwise each pass is compiled as a whole.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    experts, vision = model.experts, model.vision
    if not by_layer:
        for module, name in ((experts, "prefix"), (experts, "suffix"), (vision, "forward")):
            _compile_method(module, name)
        return
    mode = "max-autotune-no-cudagraphs"
    for layer in [*experts.vlm.layers, *experts.action.layers]:
        for name in ("before_attention", "key_value", "after_attention"):
            _compile_method(layer, name, mode=mode)
    for block in vision.layers:
        _compile_method(block, "forward", mode=mode)


def _compile_method(module: torch.nn.Module, name: str, **options: Any) -> None:
    """Replace one module's method by a compiled one.

    A compiled bound method as an attribute would be a reference cycle through the module, which
    keeps the weights on the device until a garbage collection.
    """
    run = torch.compile(getattr(type(module), name), dynamic=False, fullgraph=True, **options)
    owner = weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(owner(), *args, **kwargs)

    setattr(module, name, call)


def own_stream(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context in which CUDA work uses a stream of its own; a null context elsewhere.

    The stream waits for all earlier work on the device: the weights may still be uploading.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)
