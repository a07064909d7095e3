"""The flag that interrupts the running prompt (`comfy/model_management.py` of ComfyUI)."""

from __future__ import annotations

import threading

from comfy_emulator.node_api import InterruptProcessingException


class Interrupt:
    """Set by `/interrupt`, checked by running nodes; the check that finds it set also resets it, as in ComfyUI."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._shut_down = False

    def set(self) -> None:
        """Interrupt the running prompt."""
        self._event.set()

    def reset(self) -> None:
        """Discard an interrupt that came too late for the previous prompt."""
        if not self._shut_down:
            self._event.clear()

    def shut_down(self) -> None:
        """Interrupt the running prompt and all later ones."""
        self._shut_down = True
        self._event.set()

    def check(self) -> None:
        """Raise `InterruptProcessingException` if the prompt was interrupted."""
        if self._event.is_set():
            self.reset()
            raise InterruptProcessingException

    def sleep(self, seconds: float) -> None:
        """Sleep, and raise `InterruptProcessingException` as soon as the prompt is interrupted."""
        self._event.wait(seconds)
        self.check()
