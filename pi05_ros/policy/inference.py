"""How the network is run: operation by operation, as CUDA graphs, with fused kernels, in fp8.

How long each stage of an inference takes, on the CPU and on a GPU that works behind it.

Recording what a function asks of the device, to ask for it again at once.

Outside the standard way (`torch.compile(mode="reduce-overhead")`), because Inductor's graph trees
keep their state per thread and decide by themselves when to record anew; here a replay is a replay.


From prepared inputs to normalised actions, as the network's methods do it.

`buckets.BucketSampler` does the same with prepared shapes, for CUDA graphs and compiled kernels.


Sampling in few, prepared shapes, so that everything the device does is recorded beforehand.

Pictures that are not there are left out, prompts are padded to the next of a few lengths. Nobody
attends to padding and it advances no position, so the actions are those of any other way.
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

from pi05_ros.policy.guidance import Guide, Velocity, guidance_gain
from pi05_ros.policy.model import Mark, Pi0, Prefix, Schedule, integrate
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.quantize import quantize_prefix


class StageClock:
    """Times consecutive stages; one object per inference.

    On a GPU, the host only gives orders: what is asked of the device is timed by events between
    the orders, what the host does itself by its own clock. Both run beside each other, so the sum
    of all stages can be more than the whole.
    """

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        """Start now.

        Args:
            device: where the stages of `mark` run.
            make_event: a CUDA event that takes its time; by default on CUDA alone.
        """
        if make_event is None and device.type == "cuda":
            make_event = _cuda_event
        self._make_event = make_event
        self._host_s = time.perf_counter()
        self._events: list[tuple[str, Any]] = []
        self._timings_s: dict[str, float] = {}
        self._order: list[str] = []
        self._record("")

    def mark(self, stage: str) -> None:
        """The device's stage ends here; it began with the mark before."""
        self._order.append(stage)
        if self._make_event is None:
            self._add_host(stage)
        else:
            self._record(stage)

    def mark_host(self, stage: str) -> None:
        """The host's own stage ends here."""
        self._order.append(stage)
        self._add_host(stage)

    def skip_host(self) -> None:
        """What the host did since the last mark belongs to no stage of its own."""
        self._host_s = time.perf_counter()

    def timings_s(self) -> dict[str, float]:
        """Seconds per stage, in order. Waits until the device has finished the last one."""
        timings_s = dict(self._timings_s)
        if self._events:
            self._events[-1][1].synchronize()
        for (_, before), (stage, event) in zip(self._events, self._events[1:], strict=False):
            timings_s[stage] = before.elapsed_time(event) * 1e-3
        return {stage: timings_s[stage] for stage in dict.fromkeys(self._order)}

    def _add_host(self, stage: str) -> None:
        now_s = time.perf_counter()
        self._timings_s[stage] = self._timings_s.get(stage, 0.0) + now_s - self._host_s
        self._host_s = now_s

    def _record(self, stage: str) -> None:
        if self._make_event is not None:
            event = self._make_event()
            event.record()
            self._events.append((stage, event))


def _cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


T = TypeVar("T")

WARM_UPS = 2
"""Runs before a recording: libraries choose kernels and make their workspaces in the first."""


class Recorded(Generic[T]):
    """A function's results, and what makes them anew from what its inputs hold by then."""

    def __init__(self, outputs: T, replay: Callable[[], T | None]) -> None:
        """`replay` returns the new outputs, or None if it writes into those that are there."""
        self.outputs = outputs
        self._replay = replay

    def replay(self) -> T:
        new = self._replay()
        if new is not None:
            self.outputs = new
        return self.outputs


class Recorder(Protocol):
    """Records functions that read tensors which stay where they are, and that never wait."""

    def record(self, run: Callable[[], T]) -> Recorded[T]: ...


class DirectRecorder:
    """Records nothing: a replay runs the function. For compiled code on a CPU."""

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        return Recorded(run(), run)


class CudaRecorder:
    """CUDA graphs that share one pool of memory.

    They are captured on one side stream, because the allocator keeps free memory by stream, and
    replayed one after the other, so each uses what the others left, but for outputs in use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may talk to the device meanwhile: only this one's mistakes count
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            outputs = run()
        return Recorded(outputs, graph.replay)


@dataclass(frozen=True)
class SampleInputs:
    """One observation as the network takes it."""

    images: Tensor
    """[1, n_cameras, 3, side, side] in [-1, 1] on the device, in the network's order."""
    present: tuple[bool, ...]
    """[n_cameras] whether there is a picture."""
    tokens: Tokens
    noise: Tensor
    """[1, H, D] on the CPU."""
    state: Tensor | None = None
    """[1, max_state_dim] on the CPU, π0 alone."""
    guide: Guide | None = None
    """On the CPU."""


class Sampler(Protocol):
    """Runs the network on its device."""

    @property
    def num_steps(self) -> int: ...

    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """[1, H, D] normalised actions, float32, on the device.

        They are good until the next call. Ends the stages "vision", "prefix" and "denoise".
        """
        ...


class EagerSampler:
    """Operation by operation, in the shapes that come."""

    def __init__(self, model: Pi0, num_steps: int) -> None:
        """`model`'s weights must not change any more."""
        self._model = model
        self._schedule = model.schedule(num_steps)

    @property
    def num_steps(self) -> int:
        return len(self._schedule.times)

    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        device = self._model.device
        guide = None if inputs.guide is None else inputs.guide.to(device)
        return self._model.sample_actions(
            *prefix_inputs(inputs, device),
            **suffix_inputs(inputs, device),
            schedule=self._schedule,
            guide=guide,
            mark=mark,
        )


def prefix_inputs(
    inputs: SampleInputs, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, their masks, tokens and theirs, as `Pi0.sample_actions` takes them."""
    return (
        inputs.images,
        torch.tensor([inputs.present], device=device),
        torch.from_numpy(inputs.tokens.ids)[None].to(device),
        torch.from_numpy(inputs.tokens.mask)[None].to(device),
    )


def suffix_inputs(inputs: SampleInputs, device: torch.device) -> dict[str, Any]:
    """State and noise by the names that `Pi0.sample_actions` gives them."""
    state = None if inputs.state is None else inputs.state.to(device)
    return {"state": state, "noise": inputs.noise.to(device)}


TEXT_BUCKETS = (32, 64, 128, 200)
"""Prompt lengths in tokens; the network's own is always one. Multiples of 8 suit the kernels."""


class _StaticInput:
    """A tensor that stays where it is, filled by way of pinned memory if it is on a GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True) if on_gpu else self.tensor

    def fill(self, values: Tensor) -> None:
        """Take over a CPU tensor of the same shape; the caller may change it afterwards.

        The last inference must be over: its upload may still read the pinned memory before.
        """
        self._host.copy_(values)
        if self._host is not self.tensor:
            self.tensor.copy_(self._host, non_blocking=True)


class _Steering:
    """The identity guide, its target and weights in static memory: one recording serves all.

    With weights of 0 a step is exactly the unguided one.
    """

    def __init__(self, schedule: Schedule, shape: tuple[int, ...], device: torch.device) -> None:
        self._times = schedule.times
        self._target = _StaticInput(shape, torch.float32, device)
        self._pulls = _StaticInput((len(self._times), *shape), torch.float32, device)
        self._free = True

    def fill(self, guide: Guide | None) -> None:
        if guide is None:
            if not self._free:
                self._pulls.fill(torch.zeros_like(self._pulls.tensor, device="cpu"))
            self._free = True
            return
        self._target.fill(guide.target)
        gains = [guidance_gain(time, guide.max_weight) for time in self._times]
        self._pulls.fill(torch.stack([gain * guide.weights for gain in gains]))
        self._free = False

    def integrate(self, velocity: Velocity, noise: Tensor, schedule: Schedule) -> Tensor:
        x_t = noise
        features = schedule.features.split(1)
        for step_time, now, pull in zip(self._times, features, self._pulls.tensor, strict=False):
            v = velocity(x_t, now)
            error = self._target.tensor - torch.add(x_t, v, alpha=-step_time)
            x_t = torch.add(x_t, torch.addcmul(v, pull, error, value=-1.0), alpha=schedule.dt)
        return x_t


class _Tower(NamedTuple):
    images: Tensor
    features: Recorded[Tensor]


class _Plan(NamedTuple):
    """All that runs behind the image tower, for one number of pictures and tokens."""

    tokens: _StaticInput
    token_masks: _StaticInput
    prefix: Recorded[Prefix]
    chunk: Recorded[Tensor]


class BucketSampler:
    """A `Sampler` with recordings per number of pictures and bucket of prompt lengths."""

    def __init__(
        self,
        model: Pi0,
        num_steps: int,
        recorder: Recorder,
        buckets: Iterable[int] = TEXT_BUCKETS,
    ) -> None:
        """Record nothing yet, see `prepare`.

        Args:
            model: its weights must not change any more, nor move.
            num_steps: Euler steps.
            recorder: of the model's device.
            buckets: prompt lengths.
        """
        config, device = model.config, model.device
        longest = config.token_length
        self.buckets = tuple(sorted({min(bucket, longest) for bucket in buckets} | {longest}))
        self._model = model
        self._recorder = recorder
        self._eager = EagerSampler(model, num_steps)
        with torch.inference_mode(False):
            self._schedule = model.schedule(num_steps)
            shape = (1, config.horizon, config.max_action_dim)
            self._noise = _StaticInput(shape, torch.float32, device)
            self._steering = _Steering(self._schedule, shape, device)
            self._state = None
            if config.kind == "pi0":
                self._state = _StaticInput((1, config.max_state_dim), torch.float32, device)
        self._towers: dict[int, _Tower] = {}
        self._plans: dict[tuple[int, int], _Plan] = {}

    @property
    def num_steps(self) -> int:
        return len(self._schedule.times)

    def prepare(self, cameras: Iterable[int]) -> None:
        """Record every bucket for these numbers of pictures, so that no inference has to."""
        for count in cameras:
            for length in self.buckets:
                self._plan(count, length)

    # As in `_plan`: code compiled in one mode is compiled once more for the other.
    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """See `Sampler`. Without a picture, nothing is recorded."""
        present = [index for index, there in enumerate(inputs.present) if there]
        used = int(np.flatnonzero(inputs.tokens.mask).max(initial=0)) + 1
        if not present:
            return self._eager.sample(inputs, mark)
        length = next(bucket for bucket in self.buckets if bucket >= used)
        plan = self._plan(len(present), length)
        tower = self._towers[len(present)]
        guide = inputs.guide
        plan.tokens.fill(torch.from_numpy(inputs.tokens.ids[:length])[None])
        plan.token_masks.fill(torch.from_numpy(inputs.tokens.mask[:length])[None])
        self._noise.fill(inputs.noise)
        if self._state is not None and inputs.state is not None:
            self._state.fill(inputs.state)
        by_hand = guide is not None and guide.method != "identity"
        self._steering.fill(None if by_hand else guide)
        for row, index in enumerate(present):
            tower.images[:, row].copy_(inputs.images[:, index])
        tower.features.replay()
        mark("vision")
        prefix = plan.prefix.replay()
        mark("prefix")
        if by_hand and guide is not None:
            chunk = self._integrate_by_hand(prefix, guide)
        else:
            chunk = plan.chunk.replay()
        mark("denoise")
        return chunk

    def _integrate_by_hand(self, prefix: Prefix, guide: Guide) -> Tensor:
        """Guides that run the network backwards or ask for a time per token."""
        return integrate(
            partial(self._model.denoise, prefix, state=self._static_state()),
            self._noise.tensor.clone(),
            self._schedule,
            guide.to(self._model.device),
        )

    def _static_state(self) -> Tensor | None:
        return None if self._state is None else self._state.tensor

    def _tower(self, cameras: int) -> _Tower:
        if cameras not in self._towers:
            side = self._model.config.image_size
            images = torch.zeros((1, cameras, 3, side, side), device=self._model.device)
            features = self._recorder.record(partial(self._model.encode_images, images))
            self._towers[cameras] = _Tower(images, features)
        return self._towers[cameras]

    # A differentiating guide reads what is recorded here; inference mode's tensors forbid that.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _plan(self, cameras: int, length: int) -> _Plan:
        key = (cameras, length)
        if key in self._plans:
            return self._plans[key]
        device = self._model.device
        tower = self._tower(cameras)
        tokens = _StaticInput((1, length), torch.int64, device)
        masks = _StaticInput((1, length), torch.bool, device)
        # a recording's first runs must see something: a prompt of one token
        masks.tensor[:, 0] = True
        seen = torch.ones((1, cameras), dtype=torch.bool, device=device)

        # without `self`: a recording that runs the function again keeps it, and no cycle may hold
        # the weights when the policy is dropped
        model, schedule, steering = self._model, self._schedule, self._steering
        noise, state = self._noise.tensor, self._static_state()

        def encode() -> Prefix:
            return model.encode_tokens(tower.features.outputs, seen, tokens.tensor, masks.tensor)

        prefix = self._recorder.record(encode)

        def denoise() -> Tensor:
            velocity = partial(model.denoise, prefix.outputs, state=state)
            return steering.integrate(velocity, noise, schedule)

        plan = _Plan(tokens, masks, prefix, self._recorder.record(denoise))
        self._plans[key] = plan
        return plan


EXECUTIONS = ("auto", "eager", "graphs", "compile")
"""auto: graphs on CUDA (compile with fp8), eager elsewhere; graphs: everything the GPU does is
recorded once per number of pictures and bucket of prompt lengths; compile: kernels fused by
torch.compile before that, for minutes at the first start."""

COMPILED_SHAPES = 64
"""How many shapes of one function torch.compile makes kernels for before it gives up."""


def make_sampler(
    model: Pi0, num_steps: int, execution: str, cameras: int, fp8: bool = False
) -> Sampler:
    """Get a loaded network ready to run; call it on the thread that will run it.

    Args:
        model: on its device. It is changed where `fp8` or `execution` ask for it.
        num_steps: Euler steps.
        execution: one of `EXECUTIONS`.
        cameras: how many the robot has; graphs are recorded for 1 to so many pictures.
        fp8: run the language model's prefix pass in 8-bit floats.

    Raises:
        ValueError: an unknown execution, or one that the device does not have.
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
    recorder: Recorder = CudaRecorder(model.device) if on_cuda else DirectRecorder()
    sampler = BucketSampler(model, num_steps, recorder)
    sampler.prepare(range(1, cameras + 1) if on_cuda else [cameras])
    return sampler


def choose_execution(execution: str, on_cuda: bool, fp8: bool) -> str:
    """One of "eager", "graphs" and "compile".

    Raises:
        ValueError: an unknown execution, one that the device does not have, or fp8 on a GPU without
            compiled kernels: rounding the activations takes longer than it saves then.
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
    """Settings of the process that the choice of kernels must not leave to torch's version.

    The one convolution, of the image patches, stays in float32: torch's default for convolutions
    is TF32. Attention takes flash or the memory-efficient kernel: cuDNN's, which newer versions
    prefer, fails without a fallback where it has no plan (PyTorch issue 140930).
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def compile_network(model: Pi0, by_layer: bool) -> None:
    """Replace the network's hot functions by compiled ones.

    One layer at a time, all layers of an expert share their kernels: for networks of many layers,
    where graphs take the calls between them. Else each pass is compiled as a whole.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, COMPILED_SHAPES
    )
    experts, tower = model.experts, model.vision
    if not by_layer:
        for module, name in ((experts, "prefix"), (experts, "suffix"), (tower, "forward")):
            _compile_method(module, name)
        return
    mode = "max-autotune-no-cudagraphs"
    for layer in [*experts.vlm.stack, *experts.action.stack]:
        for name in ("project", "project_key_value", "finish"):
            _compile_method(layer, name, mode=mode)
    for block in tower.layers:
        _compile_method(block, "forward", mode=mode)


def _compile_method(module: torch.nn.Module, name: str, **options: Any) -> None:
    """Replace one module's method by a compiled one.

    A compiled bound method as an attribute would be a cycle through the module, which keeps the
    weights on the device until a garbage collection finds it.
    """
    run = torch.compile(getattr(type(module), name), dynamic=False, fullgraph=True, **options)
    owner = weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(owner(), *args, **kwargs)

    setattr(module, name, call)


def own_stream(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context in which CUDA work goes to a stream of its own; nothing elsewhere.

    It begins behind all that was asked of the device so far: the weights may still be under way.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)
