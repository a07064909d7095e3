"""Claims to submit a job to RunPod, so that only one of several gateways does it.

RunPod has no idempotency key. From just before a submission until RunPod's id is known, a job's `prompt_id` is a claim.
A claim that has expired was left by a gateway that was killed in between, or that lost its database.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

_SCHEME = "sending:"


class Claims:
    """Makes claims, and knows how long those of other gateways are valid.

    A gateway's process holds a lock on a file of its own in the data folder as long as it lives. So another process
    there, above all its successor after a kill, sees at once whether the gateway that made a claim is gone.
    """

    def __init__(self, folder: Path, valid_s: float) -> None:
        """Take the folder for the locks, and how long the claims of gateways without a lock here are valid."""
        self._name = uuid.uuid4().hex[:12]
        self._folder = folder
        self._valid_s = valid_s
        self._gone: set[str] = set()
        # Acquired and released by different threads.
        self._lock = FileLock(self._file_of(self._name), thread_local=False)

    def acquire(self) -> None:
        """Acquire this gateway's lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def release(self) -> None:
        """Release this gateway's lock."""
        self._lock.release()

    def new(self) -> str:
        """Return a new unique claim."""
        return f"{_SCHEME}{time.time():.3f}:{self._name}:{uuid.uuid4().hex[:6]}"

    def remaining_s(self, claim: str) -> float:
        """Return for how many seconds a claim is still valid, at most its full time if machines' clocks differ."""
        _scheme, claimed_at, name, *_ = claim.split(":")
        if self._is_gone(name):
            return 0.0
        return max(0.0, min(self._valid_s, float(claimed_at) + self._valid_s - time.time()))

    def _is_gone(self, name: str) -> bool:
        file = self._file_of(name)
        if name != self._name and name not in self._gone and file.exists():
            try:
                with FileLock(file, timeout=0):
                    self._gone.add(name)
            except Timeout:
                return False
            file.unlink(missing_ok=True)
        return name in self._gone

    def _file_of(self, name: str) -> Path:
        return self._folder / f"{name}.lock"


def is_claim(prompt_id: str | None) -> bool:
    """Return whether a job's `prompt_id` is a claim and not RunPod's id."""
    return prompt_id is not None and prompt_id.startswith(_SCHEME)
