"""How a running job is told to end early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from comfy_worker.errors import Cancelled


class Stop:
    """A cancel that can be set once, from any thread, and wakes whoever is blocked on the job's behalf.

    The one who sets it waits for `run_job` to return: only then is the prompt out of ComfyUI.

    Attributes:
        detached: only whoever follows the job ends.
        is_late: it ends because its time is up: what it has made is still wanted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self.detached = False
        self.is_late = False
        self._wake_ups: list[Callable[[], None]] = []

    def set(self, *, detach: bool = False, late: bool = False) -> None:
        """Ask the job to end; more than once changes nothing, but that one that is late may still be cancelled.

        With `detach` only whoever follows it ends: its prompt stays in ComfyUI, and another takes it up there. With
        `late` its time is up.
        """
        with self._lock:
            self.is_late = late and (self.is_late or not self._event.is_set())
            self.detached = self.detached or (detach and not self._event.is_set())
            self._event.set()
            wake_ups = list(self._wake_ups)
        for wake_up in wake_ups:
            wake_up()

    def is_set(self) -> bool:
        """Return whether the job was asked to end."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if the job was asked to end."""
        if self._event.is_set():
            raise Cancelled("The job was cancelled")

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds` or until the job is asked to end; return whether it was."""
        return self._event.wait(seconds)

    @contextmanager
    def waking(self, wake_up: Callable[[], None]) -> Iterator[None]:
        """Call `wake_up` when the stop is set inside this block, so that a blocking read returns at once."""
        with self._lock:
            self._wake_ups.append(wake_up)
            already = self._event.is_set()
        if already:
            wake_up()
        try:
            yield
        finally:
            with self._lock:
                self._wake_ups.remove(wake_up)
