"""Keeps fetched inputs for later jobs; several threads and processes may share one folder.

Each URL has three files, named by its hash: the `body`, its metadata as `json`, and a `lock` that guards both. A body
is written as a `part` and renamed when it is complete. A body whose hash is not the recorded one is discarded. A body
that is open stays readable after its eviction.
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
_CHUNK = 256 * 1024


@dataclass(frozen=True)
class Metadata:
    """The hash of a body and three headers of its response."""

    sha256: str
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

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    @classmethod
    def from_settings(cls, settings: Settings) -> UrlCache | None:
        """Return the cache, or None if the settings turn it off.

        Raises:
            FetchError: its folder cannot be created, or another user may write into it.
        """
        if not settings.input_cache_mb:
            return None
        default = Path(tempfile.gettempdir()) / f"comfy-worker-inputs-{os.getuid()}"
        folder = Path(settings.input_cache_dir or default)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(f"the worker's folder for inputs cannot be made: {error.strerror}") from error
        # In the system's temporary folder, another user may have created it first.
        status = default.lstat() if folder == default else None
        if status and (not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022):
            raise FetchError("the worker's folder for inputs belongs to somebody else; set INPUT_CACHE_DIR")
        return cls(folder, settings.input_cache_mb * _MB)

    @contextmanager
    def locked(self, identity: str, check: Callable[[], None]) -> Iterator[CacheEntry]:
        """Lock and yield the entry of `identity`; while the lock is awaited, `check` may raise to give up."""
        key = hashlib.sha256(identity.encode("utf-8", errors="surrogatepass")).hexdigest()
        entry = CacheEntry(self._folder / key)
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
        entries = [CacheEntry(path.with_suffix("")) for path in self._folder.glob("*.lock")]
        found = [(entry, *entry.size_and_last_use()) for entry in entries]
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
        """Return the metadata of the body, or None if there is no body; a broken one is discarded."""
        try:
            metadata = Metadata(**json.loads(self._metadata.read_text(encoding="utf-8")))
            if _sha256(self._body) == metadata.sha256:
                return metadata
        except (FileNotFoundError, ValueError, TypeError):
            pass
        self.discard()
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
        if not metadata.conditions:
            self.discard()
            return
        # If the process dies between these two steps, the hash does not match, and the body is fetched again.
        self._metadata.write_text(json.dumps(asdict(metadata)), encoding="utf-8")
        self._part.replace(self._body)

    def discard(self) -> None:
        """Remove the body, its metadata and the part."""
        for path in (self._metadata, self._body, self._part):
            path.unlink(missing_ok=True)

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
            if not (only_if_empty and self._body.exists()):
                self.discard()
                # Removed while it is held: whoever waits for it notices and creates a new one.
                Path(self.lock.lock_file).unlink(missing_ok=True)
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


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()
