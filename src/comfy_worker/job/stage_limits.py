"""How many jobs may be in each stage at the same time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class StageLimits:
    """No limits; a gateway, whose jobs share a ComfyUI, limits each stage in a subclass.

    Entering the context that a method returns waits until the job may begin the stage.
    """

    def staging(self) -> AbstractContextManager[None]:
        """Wait to upload inputs."""
        return nullcontext()

    def generating(self) -> AbstractContextManager[None]:
        """Wait to enter ComfyUI's queue."""
        return nullcontext()

    def delivering(self) -> AbstractContextManager[None]:
        """Wait to deliver outputs."""
        return nullcontext()
