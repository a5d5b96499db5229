"""How the network is run: operation by operation, as CUDA graphs, with fused kernels, in fp8."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from pi05_ros.policy.buckets import BucketSampler
from pi05_ros.policy.float8 import quantize_prefix
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.recorders import CudaRecorder, DirectRecorder, Recorder
from pi05_ros.policy.sampler import EagerSampler, Sampler

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
