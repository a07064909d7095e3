"""Reads output files: from ComfyUI's disk if this process can access it, and else with `/view`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import ComfyUnreachable
from comfy_worker.storage.content import Content, OnDisk
from comfy_worker.types import OutputFile

_CHUNK = 1024 * 1024
_FOLDERS = ("output", "temp", "input")


@contextmanager
def output_content(file: OutputFile, client: ComfyClient, check: Callable[[], None]) -> Iterator[Content]:
    """Yield the content of a file that ComfyUI reported; what has to be downloaded is a temporary file meanwhile.

    `check` is called before each chunk of a download; it may raise to end it.

    Raises:
        OutputMissing: ComfyUI does not have it.
        ComfyUnreachable: ComfyUI does not answer, or sent less than it announced.
    """
    base = client.settings.comfyui_base_directory
    if base and (on_disk := find_on_disk(Path(base), file)):
        yield on_disk
        return
    with tempfile.NamedTemporaryFile(prefix="comfyui-output-") as copy:
        for chunk in _download(file, client):
            check()
            copy.write(chunk)
        copy.flush()
        yield OnDisk(Path(copy.name), copy.tell())


def _download(file: OutputFile, client: ComfyClient) -> Iterator[bytes]:
    with closing(client.view(file)) as response:
        try:
            yield from response.iter_content(_CHUNK)
        except OSError as error:  # requests' exceptions are OSErrors
            raise ComfyUnreachable(f"ComfyUI broke off while it sent {file.filename}") from error


def find_on_disk(base: Path, file: OutputFile) -> OnDisk | None:
    """Return an output file below ComfyUI's base directory; None if it is not there, or its name leads elsewhere."""
    if file.type not in _FOLDERS:
        return None
    try:
        root = (base / file.type).resolve()
        path = (root / file.subfolder / file.filename).resolve()
        is_output = path.is_relative_to(root) and path.is_file()
        return OnDisk(path, path.stat().st_size) if is_output else None
    except (OSError, ValueError):
        # No file has such a name; ComfyUI will answer that it is missing.
        return None
