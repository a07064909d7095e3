"""Inputs that were fetched before, kept for later jobs; several threads and processes may share one folder.

Of each URL there are three files, named by its hash: the `body`, `about` it (what its server said, and the body's own
hash) and a `lock`, without which neither is touched. A body is written as a `part` and renamed, so what is there under
its name is whole; one that is not what `about` says is thrown away. Who has a body open keeps it when it is removed.
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
_POLL_INTERVAL_S = 0.05


@dataclass(frozen=True)
class About:
    """What is known of a body.

    Attributes:
        sha256: of the body, in hex.
        size: in bytes.
        etag: as its server gave it, quotes and all; so `last_modified` and `content_type`.
    """

    sha256: str
    size: int
    etag: str | None = None
    last_modified: str | None = None
    content_type: str = ""

    @property
    def conditions(self) -> Mapping[str, str]:
        """The headers with which the body is only sent if it is another by now."""
        # Not both: some servers go by the date even so, which does not tell two versions of one second apart.
        if self.etag:
            return {"If-None-Match": self.etag}
        return {"If-Modified-Since": self.last_modified} if self.last_modified else {}


class UrlCache:
    """A folder of bodies, of which the least recently used go first."""

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    @classmethod
    def of(cls, settings: Settings) -> UrlCache | None:
        """Return the cache that the settings tell of, None for none.

        Raises:
            FetchError: its folder cannot be made, or somebody else may write into it.
        """
        if not settings.input_cache_mb:
            return None
        own = Path(tempfile.gettempdir()) / f"comfy-worker-inputs-{os.getuid()}"
        folder = Path(settings.input_cache_dir) if settings.input_cache_dir else own
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat() if folder == own else folder.stat()
        except OSError as error:
            raise FetchError(f"the worker's folder for inputs cannot be made: {error.strerror}") from error
        if not stat.S_ISDIR(about.st_mode):
            raise FetchError("the worker's folder for inputs is no folder")
        if folder == own and (about.st_uid != os.getuid() or about.st_mode & 0o022):
            # Anyone may have made it there before us.
            raise FetchError("the worker's folder for inputs belongs to somebody else; set INPUT_CACHE_DIR")
        return cls(folder, settings.input_cache_mb * _MB)

    @contextmanager
    def entry(self, identity: str, check: Callable[[], None]) -> Iterator[CachedUrl]:
        """Yield what is known of `identity`, for this thread alone; `check` raises when the wait is to end."""
        key = hashlib.sha256(identity.encode("utf-8", errors="surrogatepass")).hexdigest()
        lock = FileLock(self._folder / f"{key}.lock")
        while True:
            check()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0.5, poll_interval=_POLL_INTERVAL_S)
                break
        try:
            yield CachedUrl(self._folder, key)
        finally:
            lock.release()

    def evict(self, limit_bytes: float | None = None) -> None:
        """Remove what was used least recently until the rest is within the limit, and what nobody writes any more."""
        limit = self._limit_bytes if limit_bytes is None else limit_bytes
        # One that is too large on its own would drive out all the others first.
        bodies = sorted(self._files(".body"), key=lambda file: (file[1].st_size <= limit, file[1].st_mtime_ns))
        excess = sum(about.st_size for _key, about in bodies) - limit
        for key, about in bodies:
            if excess <= 0:
                break
            if self._remove(key):
                excess -= about.st_size
        for key, _about in self._files(".lock"):
            if not self._body(key).exists():
                self._remove(key, unless_kept=True)

    def _files(self, suffix: str) -> list[tuple[str, os.stat_result]]:
        found = []
        for path in self._folder.glob(f"*{suffix}"):
            # Another process may remove it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                found.append((path.name.removesuffix(suffix), path.stat()))
        return found

    def _body(self, key: str) -> Path:
        return self._folder / f"{key}.body"

    def _remove(self, key: str, *, unless_kept: bool = False) -> bool:
        """Remove an entry unless somebody is at work on it, or it got a body meanwhile; return whether it is gone."""
        lock = FileLock(self._folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if unless_kept and self._body(key).exists():
                return False
            CachedUrl(self._folder, key).discard()
            # Held until it is gone: who waits for it finds out that it is no longer there, and makes another.
            (self._folder / f"{key}.lock").unlink(missing_ok=True)
        finally:
            lock.release()
        return True


class CachedUrl:
    """One URL's files, while they are locked."""

    def __init__(self, folder: Path, key: str) -> None:
        self._body = folder / f"{key}.body"
        self._about = folder / f"{key}.about"
        self._part = folder / f"{key}.part"

    def open_known(self) -> tuple[BinaryIO, About] | None:
        """Return the body with what is known of it, None if there is none; a broken one is thrown away."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            about = About(**json.loads(self._about.read_text(encoding="utf-8")))
            body = self._body.open("rb")
            if _hash(body) == about.sha256:
                return body, about
            body.close()
        self.discard()
        return None

    def touch(self) -> None:
        """Note that the body was used."""
        os.utime(self._body)

    def create(self) -> BinaryIO:
        """Return an empty file to write a new body into, and to read it from."""
        return self._part.open("w+b")

    def keep(self, about: About) -> None:
        """Let what was written be the body."""
        note = self._about.with_suffix(".note")
        note.write_text(json.dumps(asdict(about)), encoding="utf-8")
        # Ended between the two, this leaves a body that is not what `about` says: it is fetched anew.
        self._part.replace(self._body)
        note.replace(self._about)

    def drop_part(self) -> None:
        """Remove what was written, if it did not become the body."""
        self._part.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything that is known."""
        for path in (self._about, self._body, self._part, self._about.with_suffix(".note")):
            path.unlink(missing_ok=True)


def _hash(body: BinaryIO) -> str:
    sha256 = hashlib.sha256()
    while chunk := body.read(_CHUNK):
        sha256.update(chunk)
    body.seek(0)
    return sha256.hexdigest()
