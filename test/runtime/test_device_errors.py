"""Faults pinned: a process that lives on with a dead CUDA context; a policy unloaded, or a process
ended, by an error that the device survives."""

from __future__ import annotations

import pytest
import torch

from pi05_ros.device_errors import ErrorKind, error_kind

ADVICE = (
    "\nSearch for `cudaErrorAssert' in https://docs.nvidia.com for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect; out of memory, invalid argument"
)
MEMORY, POLICY, STICKY = ErrorKind.OUT_OF_MEMORY, ErrorKind.POLICY, ErrorKind.STICKY


class AcceleratorError(RuntimeError):
    """As torch.AcceleratorError, whose code only C++ sets."""

    def __init__(self, text: str, error_code: int) -> None:
        super().__init__(text)
        self.error_code = error_code


class Wrapped(torch.OutOfMemoryError):
    """A library's subclass."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB"), MEMORY),
        (Wrapped("CUDA out of memory."), MEMORY),
        (RuntimeError("CUDA error: out of memory" + ADVICE), MEMORY),
        (RuntimeError("CUDA driver error: out of memory"), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 99 bytes."), MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
         MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
         MEMORY),
        (AcceleratorError("CUDA error: out of memory", 2), MEMORY),
        (AcceleratorError("CUDA error: an illegal memory access was encountered", 700), STICKY),
        (AcceleratorError("CUDA error: device-side assert triggered" + ADVICE, 710), STICKY),
        (AcceleratorError("CUDA error: unspecified launch failure", 719), STICKY),
        (AcceleratorError("CUDA error: uncorrectable ECC error encountered", 214), STICKY),
        (AcceleratorError("CUDA error: a new one", 12345), STICKY),
        (AcceleratorError("CUDA error: invalid argument", 1), POLICY),
        (AcceleratorError("CUDA error: operation not permitted when stream is capturing", 900),
         POLICY),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), STICKY),
        (torch.AcceleratorError("a device that says nothing"), STICKY),
        (RuntimeError("CUDA error: device-side assert triggered" + ADVICE), STICKY),
        (RuntimeError("CUDA error: misaligned address" + ADVICE), STICKY),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), STICKY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
         STICKY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), STICKY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART"), STICKY),
        (RuntimeError("CUDA error: invalid argument" + ADVICE), POLICY),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"),
         POLICY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
         POLICY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"), POLICY),
        (RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support "
                      "the graph."), POLICY),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), POLICY),
        (RuntimeError("No CUDA GPUs are available"), POLICY),
        (ValueError("CUDA error: device-side assert triggered"), POLICY),
        (SystemExit("a library called exit"), POLICY),
    ],
)  # fmt: skip
def test_what_an_error_means(error: BaseException, kind: ErrorKind) -> None:
    assert error_kind(error) is kind
