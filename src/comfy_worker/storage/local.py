"""Delivers outputs into a folder that somebody serves over HTTP."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from urllib.parse import quote

from comfy_worker.errors import DeliveryFailed
from comfy_worker.storage.base import DeliverableFile
from comfy_worker.storage.object_keys import safe_name
from comfy_worker.types import Delivered

_CHUNK = 1024 * 1024


class LocalStorage:
    """Writes the files of one job below `folder`, which is served at `url`."""

    def __init__(self, folder: Path, url: str, prefix: str | None = None) -> None:
        self._folder = folder
        self._url = url.rstrip("/")
        self._prefix = prefix

    def deliver(self, file: DeliverableFile) -> Delivered:
        """Write the file and return its URL; an incomplete file is never visible there."""
        path = f"{self._prefix or safe_name(file.job_id)}/{file.path}"
        try:
            self._write(self._folder / path, file)
        except OSError as error:
            raise DeliveryFailed(f"{file.path} could not be written: {error.strerror}") from error
        return Delivered("url", f"{self._url}/{quote(path)}")

    def _write(self, target: Path, file: DeliverableFile) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self._folder.resolve()):
            raise DeliveryFailed(f"{file.path} could not be written: a link in its folder leads elsewhere")
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with file.content.open() as source, part.open("xb") as destination:
                shutil.copyfileobj(source, destination, _CHUNK)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
