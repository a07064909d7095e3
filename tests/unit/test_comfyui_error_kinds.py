"""Which of ComfyUI's failures mean what."""

from __future__ import annotations

import pytest

from comfy_worker.comfy.error_kinds import is_broken_device, is_out_of_memory
from comfy_worker.comfy.protocol import NodeFailed


def failed(message: str, exception_type: str = "RuntimeError") -> NodeFailed:
    return NodeFailed("31", "KSampler", message, exception_type)


@pytest.mark.parametrize(
    "failure",
    [
        failed("CUDA out of memory. Tried to allocate 20.00 MiB"),
        failed("Allocation on device 0 would exceed allowed memory."),
        failed("", "torch.OutOfMemoryError"),
        failed("", "torch.cuda.OutOfMemoryError"),
        failed("MPS backend out of memory (MPS allocated: 9 GB)"),
        failed("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        failed("Unable to allocate 9 GiB for an array", "numpy._core._exceptions._ArrayMemoryError"),
        failed("", "MemoryError"),
        failed("CUDA error: out of memory"),
        failed("The GPU is OOM"),
    ],
)
def test_want_of_memory(failure: NodeFailed) -> None:
    assert is_out_of_memory(failure)
    assert not is_broken_device(failure)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
    ],
)
def test_a_device_that_only_a_new_process_mends(message: str) -> None:
    assert is_broken_device(failed(message))
    assert not is_out_of_memory(failed(message))


@pytest.mark.parametrize(
    "message", ["", "bloom.safetensors is broken", "zoom must be positive", "No room for a mask", "Truncated File Read"]
)
def test_everything_else_is_the_workflows_own(message: str) -> None:
    assert not is_out_of_memory(failed(message))
    assert not is_broken_device(failed(message))
