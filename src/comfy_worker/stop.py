"""How a running job ends early: it is cancelled, or its time is up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from comfy_worker.errors import Cancelled, TimedOut


class Stop:
    """A cancellation that any thread can set once; it wakes up threads that block on behalf of the job.

    `run_job` removes the job's prompt from ComfyUI before it returns; `set` does not wait for that.

    Attributes:
        detached: only this process stops following the job; its prompt stays in ComfyUI.
        is_late: the job ends because its time is up, so its partial outputs are still delivered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self.detached = False
        self.is_late = False
        self._callbacks: list[Callable[[], None]] = []

    def set(self, *, detach: bool = False, late: bool = False) -> None:
        """Ask the job to end. Calling it again has no effect, except that a late job may still be cancelled.

        Args:
            detach: leave the prompt in ComfyUI, where another process resumes it.
            late: the job's time is up.
        """
        with self._lock:
            self.is_late = late and (self.is_late or not self._event.is_set())
            self.detached = self.detached or (detach and not self._event.is_set())
            self._event.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

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
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call `callback` if the stop is set during this block, or was set before: to interrupt a blocking read."""
        with self._lock:
            self._callbacks.append(callback)
            already = self._event.is_set()
        if already:
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


@contextmanager
def call_after(seconds: float, callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` in another thread if this block takes longer than `seconds`, which may be infinite."""
    timer = threading.Timer(seconds, callback)
    timer.daemon = True
    if seconds < threading.TIMEOUT_MAX:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass(frozen=True)
class Deadline:
    """When a job has to be done.

    Attributes:
        at: in seconds on the monotonic clock.
        message: the error sentence if it was not done by then.
    """

    at: float
    message: str

    def check(self) -> None:
        """Raise `TimedOut` if the deadline has passed."""
        if time.monotonic() >= self.at:
            raise TimedOut(self.message)


NO_DEADLINE = Deadline(math.inf, "")
