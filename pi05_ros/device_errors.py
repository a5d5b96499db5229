"""Classifies errors of an inference: failure of the policy, out of memory, or a lost device.

Classes and texts of torch are compared by name, because the executor does not import torch.

Sources: PyTorch `c10/cuda/CUDAException.cpp` ("CUDA error: " and cudaGetErrorString's text, raised
as torch.AcceleratorError with `error_code` from 2.8 on), `ATen/cuda/Exceptions.h` ("cuDNN error: ",
"cuDNN Frontend error: ", "CUDA error: CUBLAS_STATUS_…", "CUDA driver error: "),
`c10/cuda/CUDACachingAllocator.cpp` (torch.OutOfMemoryError, "CUDA out of memory."),
`c10/core/impl/alloc_cpu.cpp` ("DefaultCPUAllocator: can't allocate memory"); Triton's driver
("Triton Error [CUDA]: "); NVIDIA, CUDA Runtime API, error handling: the errors after which "the
process must be terminated and relaunched".
"""

from __future__ import annotations

import traceback
from enum import Enum


class ErrorKind(Enum):
    """How an inference failed."""

    POLICY = "policy"
    """The policy, its input or its output; the device works."""
    OUT_OF_MEMORY = "out of memory"
    """Of the device or of the host; the device works once memory is free."""
    STICKY = "sticky"
    """The CUDA context is lost: every further call fails until the process ends."""


_MEMORY, _POLICY, _STICKY = ErrorKind.OUT_OF_MEMORY, ErrorKind.POLICY, ErrorKind.STICKY

_CLASSES = {"OutOfMemoryError": _MEMORY, "MemoryError": _MEMORY}
"""Exceptions by the name of their class or of a base class."""

_CODES = {
    1: _POLICY,  # cudaErrorInvalidValue
    2: _MEMORY,  # cudaErrorMemoryAllocation
    9: _POLICY,  # cudaErrorInvalidConfiguration
    100: _POLICY,  # cudaErrorNoDevice
    101: _POLICY,  # cudaErrorInvalidDevice
    209: _POLICY,  # cudaErrorNoKernelImageForDevice
    400: _POLICY,  # cudaErrorInvalidResourceHandle
    701: _POLICY,  # cudaErrorLaunchOutOfResources
    720: _POLICY,  # cudaErrorCooperativeLaunchTooLarge
    801: _POLICY,  # cudaErrorNotSupported
    **dict.fromkeys(range(900, 911), _POLICY),  # cudaErrorStreamCapture… and GraphExecUpdateFailure
}
"""cudaError_t of a torch.AcceleratorError; every other code counts as sticky."""

_PREFIXES = (
    "CUDA error:",
    "CUDA driver error:",
    "cuDNN error:",
    "cuDNN Frontend error:",
    "Triton Error [CUDA]:",
)
"""Beginnings of a RuntimeError of the device, at the start or after the place that raised it."""

_TEXTS = (
    ("CUBLAS_STATUS_ALLOC_FAILED", _MEMORY),
    ("CUDNN_STATUS_ALLOC_FAILED", _MEMORY),
    ("ALLOCATION_FAILED", _MEMORY),  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_…, …_HOST_…
    ("out of memory", _MEMORY),
    ("EXECUTION_FAILED", _STICKY),  # CUBLAS_STATUS_…, CUDNN_STATUS_…, CUDNN_STATUS_…_CUDART
    ("MAPPING_ERROR", _STICKY),
    ("CUBLAS_STATUS_INTERNAL_ERROR", _STICKY),
    ("CUBLAS_STATUS_NOT_INITIALIZED", _MEMORY),  # no memory for the handle's workspace
    ("CUBLAS_STATUS_", _POLICY),  # INVALID_VALUE, NOT_SUPPORTED, ARCH_MISMATCH
    ("CUDNN_STATUS_", _POLICY),  # NOT_SUPPORTED, BAD_PARAM
    ("execution plan", _POLICY),  # "No execution plans support the graph."
    ("unable to find an engine", _POLICY),
    ("invalid argument", _POLICY),
    ("invalid configuration argument", _POLICY),
    ("invalid device ordinal", _POLICY),
    ("no CUDA-capable device", _POLICY),
    ("no kernel image is available", _POLICY),
    ("too many resources requested", _POLICY),
    ("operation not supported", _POLICY),
    ("stream is capturing", _POLICY),
    ("capture", _POLICY),  # "operation failed due to a previous error during capture", …
)
"""Texts after a prefix; the first match counts. Without a match, a CUDA or Triton error is sticky
and a cuDNN error is a failure of the policy. PyTorch's rule (`isStickyGpuError` in
`c10/cuda/CUDAMiscFunctions.h`) takes every CUDA error but "invalid argument" as sticky."""

_ALLOCATOR_TEXTS = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory",
                    "DefaultCPUAllocator: not enough memory")  # fmt: skip


def error_kind(error: BaseException) -> ErrorKind:
    """Classify what an inference raised."""
    names = [cls.__name__ for cls in type(error).__mro__]
    for name in names:
        if name in _CLASSES:
            return _CLASSES[name]
    code = getattr(error, "error_code", None)
    if "AcceleratorError" in names and isinstance(code, int):
        return _CODES.get(code, _STICKY)
    if not isinstance(error, RuntimeError):
        return _POLICY
    text = str(error)
    if any(part in text for part in _ALLOCATOR_TEXTS):
        return _MEMORY
    prefix = next((prefix for prefix in _PREFIXES if prefix in text), None)
    if prefix is None:
        return _STICKY if "AcceleratorError" in names else _POLICY
    # One line: torch appends advice that names other errors.
    said = text[text.index(prefix) + len(prefix) :].strip().split("\n")[0]
    for part, kind in _TEXTS:
        if part in said:
            return kind
    return _POLICY if prefix.startswith("cuDNN") else _STICKY


def release_frames(error: BaseException) -> None:
    """Drop the local variables that an error's traceback keeps alive, and its causes' too."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        pending += [each.__cause__, each.__context__]
