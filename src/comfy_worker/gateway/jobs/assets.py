"""The outputs' bytes, in a folder beside the database: one folder a job."""

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

_LENT_S = 3600
_SCHEME = "asset:"
"""Of the URL under which an output is noted in the store; the rest is `/<job>/<path>`."""


@dataclass(frozen=True)
class Loan:
    """An asset that another gateway has: which run of its job made it, and its content."""

    version: str
    pieces: Iterable[bytes]


class AssetStore:
    """Keeps outputs until their job expires.

    Attributes:
        elsewhere: returns an asset that is not here, None if it is nowhere.
    """

    def __init__(self, folder: Path) -> None:
        self.elsewhere: Callable[[str], Loan | None] | None = None
        self._folder = folder
        self._loans = folder.with_name(f"{folder.name}_of_others")
        folder.mkdir(parents=True, exist_ok=True)
        # Other users of the machine have no key. A folder that belongs to somebody else is for them to protect.
        with suppress(PermissionError):
            folder.chmod(0o700)

    def storage(self) -> LocalStorage:
        """Return the storage that puts outputs here."""
        return LocalStorage(self._folder, _SCHEME)

    def path_of(self, path: str) -> Path:
        """Return where the asset `<job>/<path>` lies.

        Raises:
            NotFound: there is none of this name (any more), or the name leads elsewhere.
        """
        found = _inside(self._folder, path)
        if found is not None and not found.is_file():
            found = self._borrowed(path)
        if found is None:
            raise no_such_file()
        return found

    def _borrowed(self, path: str) -> Path | None:
        """Return where a copy of an asset lies that is not ours; it is made if it is not there."""
        loan = None if self.elsewhere is None else self.elsewhere(path)
        if loan is None:
            return None
        job_id, _, rest = path.partition("/")
        target = _inside(self._loans, f"{job_id}@{loan.version}/{rest}")
        if target is None or target.is_file():
            return target
        self._forget_old_loans()
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as file:
                file.writelines(loan.pieces)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def _forget_old_loans(self) -> None:
        for job in self._loans.glob("*"):
            if job.stat().st_mtime < time.time() - _LENT_S:
                shutil.rmtree(job, ignore_errors=True)

    def remove(self, job_id: str) -> None:
        """Remove all assets of a job."""
        shutil.rmtree(self._folder / safe_name(job_id), ignore_errors=True)

    def as_base64(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """Return an output with the bytes of its files in it, as a worker's answer has them."""
        return _replaced(output, self._inline)

    def _inline(self, item: dict[str, Any], path: str) -> dict[str, Any]:
        try:
            content = self.path_of(path).read_bytes()
        except (NotFound, FileNotFoundError):
            # Not a 404: whoever asks about a job would take it for one that is not there.
            raise FileMissing(
                f"The job's file {item.get('filename')!r} is not where this gateway keeps outputs",
                hint="All gateways and workers need the same DATA_DIR, or a bucket",
            ) from None
        data = base64.b64encode(content).decode("ascii")
        return {**item, "type": "base64", "data": data}


def no_such_file() -> NotFound:
    """Return the error that says that a file is not there; of a file that its caller may not see, too."""
    return NotFound("There is no such file (any more)")


def _inside(folder: Path, path: str) -> Path | None:
    """Return where `<job>/<path>` lies below a folder, if it is in its job's own; None if it leads elsewhere."""
    try:
        found = (folder / path).resolve()
        of_job = (folder / path.partition("/")[0]).resolve()
        is_in_its_folder = of_job.parent == folder.resolve() and found.is_relative_to(of_job)
        # No file can have a name that is too long or has a zero byte.
        found.is_file()
    except (OSError, ValueError):
        return None
    return found if is_in_its_folder else None


def with_urls(output: Mapping[str, Any], url_of: Callable[[str], str]) -> dict[str, Any]:
    """Return an output with a URL for each of its files; `url_of` makes it out of `<job>/<path>`."""
    return _replaced(output, lambda item, path: {**item, "type": "url", "data": url_of(path)})


def without_files(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return an output that tells of its files and has neither their bytes nor where they are."""
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
