"""The files that a job brings with it: `input.images` and `input.files`, base64 or a URL, under a name of their own."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable

from comfy_worker.errors import InvalidInput
from comfy_worker.names import check_name
from comfy_worker.types import InputFile

FAILED = "Failed to upload one or more input images"
"""How the sentence of every fault of an input file begins, as worker-comfyui's."""

_URL = re.compile(r"(https?|s3)://", re.IGNORECASE)
_LONGEST_HEAD = 1024
"""Characters before the comma of a data URI."""
_URLSAFE = str.maketrans("-_", "+/")


def too_many_files(count: int | str, most: int) -> str:
    """Return the sentence about a job with too many input files; `count` may be "more than" a number."""
    return f"{FAILED}: the job has {count} input files, and this worker takes {most} at most"


def decode_files(items: Iterable[tuple[str, str | None, str | None]]) -> tuple[InputFile, ...]:
    """Return the files that a job brings, each given as its name, `image` and `url`.

    Raises:
        InvalidInput: a name is refused or used twice, or a file's content cannot be made out.
    """
    files: dict[str, InputFile] = {}
    try:
        for name, image, url in items:
            file = _parse_file(check_name(name, "Image name"), image, url)
            if files.setdefault(name, file) is not file:
                # Raised here, so that its sentence gets the same beginning.
                raise InvalidInput(f"Two images are named {name!r}")  # noqa: TRY301
    except InvalidInput as error:
        raise InvalidInput(f"{FAILED}: {error.message}", hint=error.hint) from None
    return tuple(files.values())


def _parse_file(name: str, image: str | None, url: str | None) -> InputFile:
    """Return a file that is there or is to be fetched; a URL may stand in either field, and so may a data URI."""
    given = [value for value in (image, url) if value is not None]
    if len(given) != 1:
        raise InvalidInput(f"Image {name!r} needs either 'image' (base64) or 'url'")
    if _URL.match(given[0]):
        return InputFile(name, url=given[0])
    if url is not None and not _split_data_uri(url)[0]:
        raise InvalidInput(f"The url of image {name!r} is neither http(s) nor s3 nor a data URI")
    return InputFile(name, decode_base64(given[0], name))


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes of a base64 text, or of what follows the comma of a data URI, with or without its `data:`.

    Line breaks and missing padding do not matter, and the URL-safe alphabet is taken too.

    Raises:
        InvalidInput: it is empty, or has a character that does not belong there; the sentence names the image.
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
    """Return what stands before the data, comma and all, and the data; the first is empty where there is no comma."""
    end = text.find(",", 0, _LONGEST_HEAD) + 1
    return text[:end], text[end:]
