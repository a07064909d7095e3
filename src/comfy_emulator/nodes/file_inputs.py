"""Nodes whose input names a file: its validation and its fingerprint (`VALIDATE_INPUTS`, `IS_CHANGED`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from comfy_emulator.folder_paths import FolderPaths


def file_validator(input_name: str, kind: str) -> Callable[..., bool | str]:
    """Return a `validate` that refuses a missing file, like `LoadImage` of ComfyUI's `nodes.py`.

    Args:
        input_name: the input with the file name.
        kind: the type of file in the error: `image`, `audio`, `video`, `latent`.
    """

    def validate(folders: FolderPaths, **inputs: str) -> bool | str:
        name = inputs[input_name]
        return True if folders.annotated_path_exists(name) else f"Invalid {kind} file: {name}"

    return validate


def file_fingerprint(input_name: str) -> Callable[..., str]:
    """Return a `fingerprint` that is the SHA-256 of the file, in hex."""

    def fingerprint(folders: FolderPaths, **inputs: str) -> str:
        return hashlib.sha256(folders.annotated_path(inputs[input_name]).read_bytes()).hexdigest()

    return fingerprint
