"""Which of ComfyUI's failures mean what."""

from __future__ import annotations

import pytest

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
def test_out_of_memory(failure: NodeFailed) -> None:
    assert failure.is_out_of_memory
    assert not failure.is_broken_device


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
    ],
)
def test_broken_devices(message: str) -> None:
    assert failed(message).is_broken_device
    assert not failed(message).is_out_of_memory


@pytest.mark.parametrize(
    "message", ["", "bloom.safetensors is broken", "zoom must be positive", "No room for a mask", "Truncated File Read"]
)
def test_other_errors_are_the_workflows_own(message: str) -> None:
    assert not failed(message).is_out_of_memory
    assert not failed(message).is_broken_device
