"""The one switch that stops the running prompt."""

from __future__ import annotations

import threading

from comfy_emulator.node_api import Interrupted


class Interrupt:
    """Set by `/interrupt`, looked at by running nodes; whoever meets it takes it away, as in ComfyUI."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._shut_down = False

    def set(self) -> None:
        """Stop what runs."""
        self._event.set()

    def reset(self) -> None:
        """Forget an interrupt that was meant for an earlier prompt."""
        if not self._shut_down:
            self._event.clear()

    def shut_down(self) -> None:
        """Stop what runs, and whatever would run after it."""
        self._shut_down = True
        self._event.set()

    def check(self) -> None:
        """Raise `Interrupted` if the running prompt is to stop."""
        if self._event.is_set():
            self.reset()
            raise Interrupted

    def sleep(self, seconds: float) -> None:
        """Wait, but raise `Interrupted` as soon as the running prompt is to stop."""
        self._event.wait(seconds)
        self.check()
