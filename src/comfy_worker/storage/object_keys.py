"""What a delivered file is called: the keys of objects and the paths of files. No I/O."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Iterator
from datetime import date

from comfy_worker.errors import DeliveryFailed, InvalidInput
from comfy_worker.names import check_name
from comfy_worker.storage.base import DeliverableFile

_FIELDS = ("job_id", "filename", "node_id", "index", "date", "prefix")
_SETTING = "BUCKET_KEY_TEMPLATE"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_LONGEST_KEY = 1024
"""Bytes, from the documentation of S3."""


def safe_path(path: str) -> str:
    """Return a relative path that stays in its folder and that S3, URLs and file systems can all take.

    Parts that lead elsewhere are left out. A node may report any name.
    """
    text = _CONTROL.sub("_", path.encode("utf-8", "replace").decode("utf-8"))
    return "/".join(part for part in text.split("/") if part not in ("", ".", "..")) or "_"


def safe_name(text: str) -> str:
    """Return a name for one folder, from an id that may be any text."""
    name = _UNSAFE.sub("-", text)
    return name if name.strip(".") else "-"


def check_template(template: str) -> None:
    """Refuse a template whose keys could overwrite each other or would be no paths.

    Raises:
        InvalidInput: the sentence says what is wrong with it.
    """
    fields = set(_fields(template))
    if not fields & {"job_id", "prefix"}:
        raise InvalidInput(f"{_SETTING} needs {{job_id}} or {{prefix}}: outputs of two jobs would have the same key")
    if "filename" not in fields and not {"node_id", "index"} <= fields:
        raise InvalidInput(
            f"{_SETTING} needs {{filename}}, or {{node_id}} and {{index}}: two outputs of a job would have the same key"
        )
    check_name(template.format(**dict.fromkeys(_FIELDS, "x")), _SETTING)


def _fields(template: str) -> Iterator[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        raise InvalidInput(f"{_SETTING} has a single brace; one that is meant is written twice") from None
    for _literal, field, form, conversion in parts:
        if field is None:
            continue
        if field not in _FIELDS or form or conversion:
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            raise InvalidInput(f"{_SETTING} has a placeholder that is none of {known}")
        yield field


def bucket_of_the_month() -> str:
    """Return the bucket that RunPod's own uploader takes where none is named: `11-26` in November 2026."""
    return time.strftime("%m-%y")


def object_key(template: str, parcel: DeliverableFile, prefix: str | None, today: date) -> str:
    """Return the key of a job's file in a bucket.

    Args:
        template: one that `check_template` took.
        parcel: the file.
        prefix: the folder that the job asks for; it stands where the template has `{prefix}`, else in place of
            `{job_id}`. A job that asks for none gets its id.
        today: for `{date}`.

    Raises:
        DeliveryFailed: the key is longer than S3 allows.
    """
    job_id = safe_name(parcel.job_id)
    folder = prefix or job_id
    key = safe_path(
        template.format(
            job_id=job_id if "{prefix}" in template else folder,
            prefix=folder,
            filename=parcel.path,
            node_id=safe_name(parcel.node_id),
            index=parcel.index,
            date=today.isoformat(),
        )
    )
    if len(key.encode()) > _LONGEST_KEY:
        raise DeliveryFailed(f"The key of {parcel.path[:40]}… would be longer than {_LONGEST_KEY} bytes")
    return key
