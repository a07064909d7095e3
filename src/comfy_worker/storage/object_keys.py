"""Names of delivered files: keys of objects and paths of files. No I/O."""

from __future__ import annotations

import re
import time
from datetime import date

from comfy_worker.errors import DeliveryFailed, InvalidInput
from comfy_worker.names import CONTROL_CHARACTERS, check_name
from comfy_worker.storage.base import DeliverableFile

_FIELDS = ("job_id", "filename", "node_id", "index", "date", "prefix")
_PLACEHOLDER = re.compile(rf"{{({'|'.join(_FIELDS)})}}")
_SETTING = "BUCKET_KEY_TEMPLATE"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
MAX_KEY_BYTES = 1024
"""From the documentation of S3."""


def safe_path(path: str) -> str:
    """Return a relative path that stays in its folder and is valid in S3, URLs and file systems.

    Nodes may report any name; segments that lead elsewhere are left out.
    """
    text = CONTROL_CHARACTERS.sub("_", path.encode("utf-8", "replace").decode("utf-8"))
    return "/".join(part for part in text.split("/") if part not in ("", ".", "..")) or "_"


def safe_name(text: str) -> str:
    """Return the name of a folder for an id, which may be any text."""
    name = _UNSAFE.sub("-", text)
    return name if name.strip(".") else "-"


def check_template(template: str) -> None:
    """Refuse a template whose keys would be invalid or could overwrite each other.

    Raises:
        InvalidInput: the sentence says what is wrong.
    """
    fields = set(_PLACEHOLDER.findall(template))
    if re.search(r"[{}]", _PLACEHOLDER.sub("", template.replace("{{", "").replace("}}", ""))):
        known = ", ".join(f"{{{name}}}" for name in _FIELDS)
        raise InvalidInput(f"{_SETTING} has a placeholder that is none of {known}; a literal brace is written twice")
    if not fields & {"job_id", "prefix"}:
        raise InvalidInput(f"{_SETTING} needs {{job_id}} or {{prefix}}: outputs of two jobs would have the same key")
    if "filename" not in fields and not {"node_id", "index"} <= fields:
        raise InvalidInput(
            f"{_SETTING} needs {{filename}}, or {{node_id}} and {{index}}: two outputs of a job would have the same key"
        )
    check_name(template.format(**dict.fromkeys(_FIELDS, "x")), _SETTING)


def bucket_of_the_month() -> str:
    """Return the bucket that RunPod's uploader uses if none is named: `11-26` in November 2026."""
    return time.strftime("%m-%y")


def object_key(template: str, file: DeliverableFile, prefix: str | None, today: date) -> str:
    """Return the key of a job's file in a bucket.

    Args:
        template: one that `check_template` accepts.
        file: the file.
        prefix: the folder that the job asks for. It replaces `{prefix}` if the template has it, else `{job_id}`;
            without a prefix, both are the job's id.
        today: the value of `{date}`.

    Raises:
        DeliveryFailed: the key is longer than S3 allows.
    """
    job_id = safe_name(file.job_id)
    folder = prefix or job_id
    key = safe_path(
        template.format(
            job_id=job_id if "{prefix}" in template else folder,
            prefix=folder,
            filename=file.path,
            node_id=safe_name(file.node_id),
            index=file.index,
            date=today.isoformat(),
        )
    )
    if len(key.encode()) > MAX_KEY_BYTES:
        raise DeliveryFailed(f"The key of {file.path[:40]}… would be longer than {MAX_KEY_BYTES} bytes")
    return key
