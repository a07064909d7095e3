"""Who submits a job to RunPod: noted before it is done, so that of several gateways one does it.

RunPod has no idempotency key. A job's `prompt_id` is a claim from just before its submission until RunPod's id is
known; a claim that has lapsed was left by a gateway that was killed in between, or that lost its database.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

_SCHEME = "sending:"


class Claims:
    """The claims of this gateway, and what it knows of those of others.

    As long as its process lives it holds a lock on a file of its own in the data folder: another process there, its
    successor after a kill above all, sees at once whether a claim's maker is gone.
    """

    def __init__(self, folder: Path, lapse_after_s: float) -> None:
        """Take the folder for the locks, and how long a claim holds whose maker cannot be seen from here."""
        self._name = uuid.uuid4().hex[:12]
        self._folder = folder
        self._lapse_after_s = lapse_after_s
        self._gone: set[str] = set()
        # Taken and given back by different threads.
        self._lock = FileLock(self._file_of(self._name), thread_local=False)

    def begin(self) -> None:
        """Be seen to live, from now on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def end(self) -> None:
        """Be seen to be gone."""
        self._lock.release()

    def new(self) -> str:
        """Return a claim that nobody else makes."""
        return f"{_SCHEME}{time.time():.3f}:{self._name}:{uuid.uuid4().hex[:6]}"

    def remaining_s(self, claim: str) -> float:
        """Return for how many seconds nobody else may submit the job, however the clocks of machines differ."""
        _scheme, claimed_at, name, *_ = claim.split(":")
        if self._is_gone(name):
            return 0.0
        return max(0.0, min(self._lapse_after_s, float(claimed_at) + self._lapse_after_s - time.time()))

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
    """Return whether a job's `prompt_id` is a claim, and no id of RunPod's."""
    return prompt_id is not None and prompt_id.startswith(_SCHEME)
