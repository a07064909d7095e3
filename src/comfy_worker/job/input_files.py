"""Decodes `input.images` and `input.files`: files in base64 or by URL, each with a name."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from comfy_worker.errors import InvalidInput
from comfy_worker.graph.file_references import is_fetched
from comfy_worker.names import check_name
from comfy_worker.types import InputFile

UPLOAD_FAILED = "Failed to upload one or more input images"
"""The beginning of each error sentence about an input file, as in worker-comfyui."""

_MAX_HEAD_LENGTH = 1024
"""Characters up to the comma of a data URI."""
_URLSAFE = str.maketrans("-_", "+/")


def too_many_files(count: int | str, limit: int) -> str:
    """Return the error sentence for a job with too many input files; `count` may be "more than 5"."""
    return f"{UPLOAD_FAILED}: the job has {count} input files, and this worker takes {limit} at most"


def decode_files(items: Iterable[tuple[str, str | None, str | None]]) -> tuple[InputFile, ...]:
    """Return the files of a job, each given as `(name, image, url)`.

    Raises:
        InvalidInput: a name is refused or used twice, or a file cannot be decoded.
    """
    files: dict[str, InputFile] = {}
    try:
        for name, image, url in items:
            file = _parse_file(check_name(name, "Image name"), image, url)
            if files.setdefault(name, file) is not file:
                raise InvalidInput(f"Two images are named {name!r}")  # noqa: TRY301 - gets its prefix below
    except InvalidInput as error:
        raise InvalidInput(f"{UPLOAD_FAILED}: {error.message}", hint=error.hint) from None
    return tuple(files.values())


def _parse_file(name: str, image: str | None, url: str | None) -> InputFile:
    """Return a file; a URL or a data URI may be in either of the two fields."""
    given = [value for value in (image, url) if value is not None]
    if len(given) != 1:
        raise InvalidInput(f"Image {name!r} needs either 'image' (base64) or 'url'")
    if is_fetched(given[0]):
        return InputFile(name, url=given[0])
    if url is not None and not _split_data_uri(url)[0]:
        raise InvalidInput(f"The url of image {name!r} is neither http(s) nor s3 nor a data URI")
    return InputFile(name, decode_base64(given[0], name))


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes of a base64 text or of a data URI, even one without its `data:`.

    Whitespace, missing padding and the URL-safe alphabet are accepted.

    Raises:
        InvalidInput: empty or invalid base64; the message includes `name`.
    """
    head, encoded = _split_data_uri(text)
    if not head and text[:5].lower() == "data:":
        raise InvalidInput(f"Image {name!r} is a data URI without a comma before its data")
    if any(space in encoded for space in "\n\r\t "):
        encoded = "".join(encoded.split())
    if not encoded:
        raise InvalidInput(f"Image {name!r} is empty")
    if "-" in encoded or "_" in encoded:
        encoded = encoded.translate(_URLSAFE)
    encoded = encoded.rstrip("=")
    try:
        content = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content:
        says_so = head[:5].lower() != "data:" or head.lower().endswith(";base64,")
        raise InvalidInput(f"Image {name!r} is {'not valid base64' if says_so else 'a data URI that is not base64'}")
    return content


def _split_data_uri(text: str) -> tuple[str, str]:
    """Return the head of a data URI, with its comma, and the data; the head is empty if there is no comma."""
    end = text.find(",", 0, _MAX_HEAD_LENGTH) + 1
    return text[:end], text[end:]
