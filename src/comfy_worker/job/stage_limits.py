"""When a job may do what, where many share a ComfyUI."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class StageLimits:
    """When a job may do what: here at once; a gateway with many jobs lets them take turns.

    Each method returns a context in which the job does its part; entering it waits for the job's turn.
    """

    def staging(self) -> AbstractContextManager[None]:
        """Upload inputs."""
        return nullcontext()

    def generating(self) -> AbstractContextManager[None]:
        """Be in ComfyUI's queue."""
        return nullcontext()

    def delivering(self) -> AbstractContextManager[None]:
        """Hand outputs over."""
        return nullcontext()
