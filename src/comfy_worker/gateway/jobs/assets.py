"""The files of outputs, in a folder next to the database: one folder for each job."""

from __future__ import annotations

import base64
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from comfy_worker.gateway.errors import FileMissing, NotFound
from comfy_worker.storage.local import LocalStorage
from comfy_worker.storage.object_keys import safe_name
from comfy_worker.types import Kind

_PEER_FILES_KEPT_S = 3600
_SCHEME = "asset:"
"""The scheme of an output's URL in the store; the rest is `/<job>/<path>`."""


@dataclass(frozen=True)
class PeerFile:
    """A file of another gateway: which run of its job made it, and its content."""

    version: str
    chunks: Iterable[bytes]


class AssetStore:
    """Keeps output files until their job expires.

    Attributes:
        open_peer_file: returns a file that another gateway has, None if none has it.
    """

    def __init__(self, folder: Path) -> None:
        self.open_peer_file: Callable[[str], PeerFile | None] | None = None
        self._folder = folder
        self._peer_files = folder.with_name(f"{folder.name}_of_others")
        folder.mkdir(parents=True, exist_ok=True)
        # Only for this user. If the folder belongs to somebody else, they have to protect it.
        with suppress(PermissionError):
            folder.chmod(0o700)

    def storage(self) -> LocalStorage:
        """Return the storage that delivers outputs here."""
        return LocalStorage(self._folder, _SCHEME)

    def path_of(self, path: str) -> Path:
        """Return the path of the file `<job>/<path>`.

        Raises:
            NotFound: there is no such file, or the path leads out of the job's folder.
        """
        found = _below(self._folder, path)
        if found is not None and not found.is_file():
            found = self._fetch_from_peer(path)
        if found is None:
            raise no_such_file()
        return found

    def _fetch_from_peer(self, path: str) -> Path | None:
        """Return the path of a copy of another gateway's file, which is fetched if there is none yet."""
        file = None if self.open_peer_file is None else self.open_peer_file(path)
        if file is None:
            return None
        job_id, _, rest = path.partition("/")
        target = _below(self._peer_files, f"{job_id}@{file.version}/{rest}")
        if target is None or target.is_file():
            return target
        self._remove_old_peer_files()
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as copy:
                copy.writelines(file.chunks)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def _remove_old_peer_files(self) -> None:
        for job in self._peer_files.glob("*"):
            if job.stat().st_mtime < time.time() - _PEER_FILES_KEPT_S:
                shutil.rmtree(job, ignore_errors=True)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self._folder / safe_name(job_id), ignore_errors=True)

    def as_base64(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """Return an output with the content of its files in it, like the result of a worker."""
        return _replaced(output, self._inline)

    def _inline(self, item: dict[str, Any], path: str) -> dict[str, Any]:
        try:
            content = self.path_of(path).read_bytes()
        except (NotFound, FileNotFoundError):
            # Not a 404: it would say that the job does not exist.
            raise FileMissing(
                f"The job's file {item.get('filename')!r} is not where this gateway keeps outputs",
                hint="All gateways and workers need the same DATA_DIR, or a bucket",
            ) from None
        data = base64.b64encode(content).decode("ascii")
        return {**item, "type": "base64", "data": data}


def no_such_file() -> NotFound:
    """Return the error for a file that does not exist, or that its caller may not see."""
    return NotFound("There is no such file, or it has expired")


def _below(folder: Path, path: str) -> Path | None:
    """Return the path of `<job>/<path>` below a folder; None if it leads out of the job's folder."""
    try:
        found = (folder / path).resolve()
        of_job = (folder / path.partition("/")[0]).resolve()
        is_in_its_folder = of_job.parent == folder.resolve() and found.is_relative_to(of_job)
        # Raises if a name is too long or has a zero byte.
        found.is_file()
    except (OSError, ValueError):
        return None
    return found if is_in_its_folder else None


def with_urls(output: Mapping[str, Any], url_of: Callable[[str], str]) -> dict[str, Any]:
    """Return an output with a URL for each of its files; `url_of` makes the URL for `<job>/<path>`."""
    return _replaced(output, lambda item, path: {**item, "type": "url", "data": url_of(path)})


def without_files(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return an output that describes its files, without their content or URLs."""
    return _replaced(output, lambda item, _path: {key: value for key, value in item.items() if key != "data"})


def _replaced(output: Mapping[str, Any], replace: Callable[[dict[str, Any], str], dict[str, Any]]) -> dict[str, Any]:
    replaced = dict(output)
    for kind in Kind:
        if kind.value in output:
            replaced[kind.value] = [
                replace(item, path) if (path := _path_of(item)) is not None else item for item in output[kind.value]
            ]
    return replaced


def _path_of(item: Mapping[str, Any]) -> str | None:
    data = str(item.get("data", ""))
    return unquote(data.removeprefix(f"{_SCHEME}/")) if data.startswith(f"{_SCHEME}/") else None
