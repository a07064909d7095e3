"""Classifies the errors of nodes by the wordings of PyTorch, CUDA, ROCm and NumPy. No I/O."""

from __future__ import annotations

import re

from comfy_worker.comfy.protocol import NodeFailed

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|not enough memory|Allocation on device|CUBLAS_STATUS_ALLOC_FAILED|"
    r"CUDNN_STATUS_ALLOC_FAILED|can't allocate memory|cannot allocate memory|unable to allocate|"
    r"HIP error: out of memory|MemoryError|cudaErrorMemoryAllocation|\bOOM\b",
    re.IGNORECASE,
)
_BROKEN_DEVICE = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|"
    r"illegal instruction was encountered|CUDA driver error|CUDNN_STATUS_EXECUTION_FAILED|"
    r"CUBLAS_STATUS_EXECUTION_FAILED|uncorrectable ECC error|"
    r"CUDA-capable device\(s\) is/are busy|no longer on the bus|context is destroyed|hardware stack error|"
    r"CUDA error: (?!out of memory)(?:launch|initialization error|unknown error|device)",
    re.IGNORECASE,
)
"""After one of these every later CUDA call of the same process fails too."""


def is_out_of_memory(failed: NodeFailed) -> bool:
    """Return whether a node ran out of memory, on the GPU or the host."""
    return bool(_OUT_OF_MEMORY.search(f"{failed.exception_type}: {failed.message}"))


def is_broken_device(failed: NodeFailed) -> bool:
    """Return whether a node broke the GPU context, which only a new process can repair."""
    return not is_out_of_memory(failed) and bool(_BROKEN_DEVICE.search(failed.message))
