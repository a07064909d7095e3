"""What a job made, by what each file is. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comfy_worker.jobs import Kind


def files_by_kind(output: Mapping[str, Any]) -> dict[Kind, list[Mapping[str, Any]]]:
    """Return the files of an output by what they are; every kind is there, if with no file."""
    found: dict[Kind, list[Mapping[str, Any]]] = {kind: [] for kind in Kind}
    for listed_as, item in _files(output):
        found[kind_of(item, listed_as)].append(item)
    return found


def kind_of(item: Mapping[str, Any], listed_as: Kind) -> Kind:
    """Return what a file is: RunPod's output has ComfyUI's own videos among the pictures, as ComfyUI does."""
    is_video = str(item.get("mime_type", "")).startswith("video/")
    return Kind.VIDEO if listed_as is Kind.IMAGE and is_video else listed_as


def _files(output: Mapping[str, Any]) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
    for kind in Kind:
        for item in output.get(kind.value, []):
            yield kind, item
