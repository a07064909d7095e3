"""Keeps fetched inputs for later jobs; several threads and processes may share one folder.

Each URL has three files, named by its hash: the `body`, its metadata as `json`, and a `lock` that guards both. A body
is written as a `part` and renamed when it is complete. A body that is open stays readable after its eviction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from comfy_worker.net.errors import FetchError
from comfy_worker.settings import Settings

_MB = 1024 * 1024


@dataclass(frozen=True)
class Metadata:
    """The size of a body in bytes and three headers of its response."""

    size: int
    etag: str | None = None
    last_modified: str | None = None
    content_type: str = ""

    @property
    def conditions(self) -> Mapping[str, str]:
        """The request headers with which a server sends the body only if it has changed."""
        # Never both: some servers then go by the date alone, which does not tell two versions of one second apart.
        if self.etag:
            return {"If-None-Match": self.etag}
        return {"If-Modified-Since": self.last_modified} if self.last_modified else {}


class UrlCache:
    """A folder of bodies; the least recently used are evicted first."""

    def __init__(self, settings: Settings) -> None:
        """Create the folder.

        Raises:
            FetchError: it cannot be created, or another user may write into it.
        """
        self._limit_bytes = settings.input_cache_mb * _MB
        default = Path(tempfile.gettempdir()) / f"comfy-worker-inputs-{os.getuid()}"
        self._folder = Path(settings.input_cache_dir or default)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(f"the worker's folder for inputs cannot be made: {error.strerror}") from error
        # In the system's temporary folder, another user may have created it first.
        status = self._folder.lstat()
        if self._folder == default and (status.st_uid != os.getuid() or status.st_mode & 0o170022 != stat.S_IFDIR):
            raise FetchError("the worker's folder for inputs belongs to somebody else; set INPUT_CACHE_DIR")

    @contextmanager
    def locked(self, identity: str, check: Callable[[], None]) -> Iterator[CacheEntry]:
        """Lock and yield the entry of `identity`; while the lock is awaited, `check` may raise to give up."""
        entry = CacheEntry(self._folder / hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest())
        while not entry.lock.is_locked:
            check()
            with contextlib.suppress(Timeout):
                entry.lock.acquire(timeout=0.5, poll_interval=0.05)
        try:
            yield entry
        finally:
            entry.lock.release()

    def evict(self, limit_bytes: float | None = None) -> None:
        """Remove the least recently used bodies beyond the limit, and what killed processes left."""
        limit = self._limit_bytes if limit_bytes is None else limit_bytes
        found = [(entry, *entry.size_and_last_use()) for entry in map(CacheEntry, self._folder.glob("*.lock"))]
        # A body that exceeds the limit on its own goes first: it would evict all others.
        found.sort(key=lambda one: (one[1] <= limit, one[2]))
        excess = sum(size for _entry, size, _last_use in found) - limit
        for entry, size, _last_use in found:
            if entry.remove(only_if_empty=excess <= 0):
                excess -= size


class CacheEntry:
    """The files of one URL; all methods but `size_and_last_use` and `remove` require the lock."""

    def __init__(self, stem: Path) -> None:
        self.lock = FileLock(stem.with_suffix(".lock"))
        self._body = stem.with_suffix(".body")
        self._metadata = stem.with_suffix(".json")
        self._part = stem.with_suffix(".part")

    def metadata(self) -> Metadata | None:
        """Return the metadata of the body, or None if there is no body, or a broken one."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            metadata = Metadata(**json.loads(self._metadata.read_text(encoding="utf-8")))
            if self._body.stat().st_size == metadata.size:
                return metadata
        return None

    def open(self) -> BinaryIO:
        """Return the body, open for reading, and record its use."""
        os.utime(self._body)
        return self._body.open("rb")

    @contextmanager
    def new_body(self) -> Iterator[BinaryIO]:
        """Yield a file for the next body; unless it is committed, it is removed."""
        try:
            with closed_on_error(self._part.open("w+b")) as file:
                yield file
        finally:
            self._part.unlink(missing_ok=True)

    def commit(self, metadata: Metadata) -> None:
        """Keep the new body, unless nothing shows a server later whether it has changed."""
        # In this order, metadata is never that of another body.
        self._body.unlink(missing_ok=True)
        if metadata.conditions:
            self._metadata.write_text(json.dumps(asdict(metadata)), encoding="utf-8")
            self._part.replace(self._body)

    def size_and_last_use(self) -> tuple[int, int]:
        """Return the body's size in bytes and its last use in nanoseconds; zeros if there is none."""
        try:
            status = self._body.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    def remove(self, *, only_if_empty: bool) -> bool:
        """Remove all files of an entry that nobody uses; return whether they are gone."""
        with contextlib.suppress(Timeout), self.lock.acquire(timeout=0):
            if only_if_empty and self._body.exists():
                return False
            # The lock is removed last, while it is held: a process that waits for it notices and creates a new one.
            for path in (self._metadata, self._body, self._part, Path(self.lock.lock_file)):
                path.unlink(missing_ok=True)
            return True
        return False


@contextmanager
def closed_on_error(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield a file that is closed if the block raises."""
    try:
        yield file
    except BaseException:
        file.close()
        raise
