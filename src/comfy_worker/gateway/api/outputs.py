"""The files of a job's output, by what each file is. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comfy_worker.types import Kind


def files_by_kind(output: Mapping[str, Any]) -> dict[Kind, list[Mapping[str, Any]]]:
    """Return the files of an output by kind, with an empty list for a kind without files."""
    found: dict[Kind, list[Mapping[str, Any]]] = {kind: [] for kind in Kind}
    for listed_as, item in _files(output):
        found[kind_of(item, listed_as)].append(item)
    return found


def kind_of(item: Mapping[str, Any], listed_as: Kind) -> Kind:
    """Return what a file is: like ComfyUI, RunPod's output lists the videos of ComfyUI's own nodes as images."""
    is_video = str(item.get("mime_type", "")).startswith("video/")
    return Kind.VIDEO if listed_as is Kind.IMAGE and is_video else listed_as


def path_in_job(item: Mapping[str, Any]) -> str:
    """Return a file's path below its job's folder or prefix, wherever it is stored."""
    return f"{item['subfolder']}/{item['filename']}" if item.get("subfolder") else str(item["filename"])


def bucket_link(output: Mapping[str, Any], path: str) -> str | None:
    """Return the link to the file with a path in its job, if it is in a bucket; None if there is no such file."""
    for _listed_as, item in _files(output):
        link = item.get("url") or (item["data"] if item["type"] == "s3_url" else None)
        if link and path_in_job(item) == path:
            return str(link)
    return None


def _files(output: Mapping[str, Any]) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
    for kind in Kind:
        for item in output.get(kind.value, []):
            yield kind, item
