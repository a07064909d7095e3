"""The base class of modifiers."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from comfy_worker.gateway.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.gateway.modifiers.random_ints import HIGHEST, RANDOM_INT, fill_random_ints
from comfy_worker.gateway.modifiers.values import RecordedValues
from comfy_worker.strict_json import InvalidJson, parse_json

_URL = re.compile(r"https?://", re.IGNORECASE)
_NEEDS_INPUT_FOLDER = (
    "input_dir",
    "download_file",
    "find_input_file",
    "list_files_in_directory",
    "get_file_extension",
)
"""Members of AI-Dock's class that need ComfyUI's input folder, which is on the worker's machine."""


class BaseModifier:
    """Builds a workflow from a file and the `modifications` in a request.

    The interface is that of the AI-Dock ComfyUI API wrapper, whose modifiers run unchanged, including their import
    `from modifiers.basemodifier import BaseModifier`.

    Attributes:
        WORKFLOW_JSON: the workflow's file, in API format; "" for a modifier that overrides `load_workflow`.
        RANDOM_INT_PLACEHOLDER: text in the workflow that is replaced with a random integer.
        RANDOM_INT_MIN: the lowest of these integers.
        RANDOM_INT_MAX: the highest of these integers.
        workflow_folders: folders in which a relative `WORKFLOW_JSON` is searched for; set by the gateway.
        modifications: the values in the request.
        workflow: a copy of the graph that the modifier may change; loaded before `apply_modifications` runs.
    """

    WORKFLOW_JSON: str = ""
    RANDOM_INT_PLACEHOLDER: str = RANDOM_INT
    RANDOM_INT_MIN: int = 0
    RANDOM_INT_MAX: int = HIGHEST
    workflow_folders: Sequence[Path] = ()

    def __init__(self, modifications: Mapping[str, Any] | None = None) -> None:
        self.modifications: dict[str, Any] = RecordedValues(modifications or {})
        self.workflow: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in _NEEDS_INPUT_FOLDER:
            raise ModifierFailed(
                f"Modifier {self._name} uses {name}, but ComfyUI's folders are on another machine",
                hint="Leave the URL in the workflow: the worker downloads it",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    async def load_workflow(self, workflow: Mapping[str, Any] | None = None) -> None:
        """Load `self.workflow` from the file or, for a modifier without a file, copy `workflow`.

        Raises:
            ModifierFailed: there is neither; or the file does not exist, or is no JSON object.
        """
        if self.WORKFLOW_JSON:
            self.workflow = self._read_workflow()
        elif workflow:
            self.workflow = copy.deepcopy(dict(workflow))
        else:
            raise ModifierFailed(f"Modifier {self._name} has no WORKFLOW_JSON")

    async def modify_workflow_value(self, key: str, default: Any = None) -> Any:
        """Return the request's value for `key`, or else `default`.

        Without a default, or with None, the value is required, unless the key is an http(s) URL: then the key itself
        is returned.

        Raises:
            MissingValue: the request has no such value, and there is no default.
        """
        if key in self.modifications:
            return self.modifications[key]
        if default is not None:
            return default
        if _URL.match(key):
            return key
        raise MissingValue(f"Modifier {self._name} needs the value {key!r}", hint=f"Send it as modifications.{key}")

    async def apply_modifications(self) -> None:
        """Replace the workflow's URLs and random integers; modifiers call this after their own changes."""
        self.workflow = await self.replace_workflow_urls(self.workflow)
        self.replace_random_ints(self.workflow)

    async def get_modified_workflow(self) -> dict[str, Any]:
        """Apply the modifications and return the workflow."""
        await self.apply_modifications()
        return self.workflow

    def replace_random_ints(self, data: Any) -> Any:
        """Replace each `__RANDOM_INT__` in `data` with a random integer, in place, and return `data`."""
        return fill_random_ints(data, self.RANDOM_INT_MIN, self.RANDOM_INT_MAX, self.RANDOM_INT_PLACEHOLDER)

    async def replace_workflow_urls(self, data: Any) -> Any:
        """Return `data` unchanged: the worker downloads its URLs and replaces them with file names."""
        return data

    async def get_url_content(self, url: str) -> str:
        """Return the URL unchanged: the worker downloads it and replaces it with the file's name."""
        return url

    def is_url(self, value: Any) -> bool:
        """Return whether a value is a URL."""
        try:
            parts = urlsplit(value)
        except (ValueError, AttributeError, TypeError):
            return False
        return bool(parts.scheme and parts.netloc)

    def get_url_hash(self, url: str) -> str:
        """Return the MD5 of a URL as hexadecimal digits."""
        return hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _read_workflow(self) -> dict[str, Any]:
        file = self._find_workflow()
        try:
            workflow = parse_json(file.read_bytes())
        except (OSError, InvalidJson):
            raise ModifierFailed(f"Modifier {self._name} cannot read its workflow {file.name}") from None
        if not isinstance(workflow, dict):
            raise ModifierFailed(f"Modifier {self._name} has a workflow that is not an object of nodes: {file.name}")
        return workflow

    def _find_workflow(self) -> Path:
        # Joining a folder and an absolute path gives the absolute path.
        paths = [folder / self.WORKFLOW_JSON for folder in self.workflow_folders] or [Path(self.WORKFLOW_JSON)]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise ModifierFailed(f"Modifier {self._name} does not find its workflow {Path(self.WORKFLOW_JSON).name}")
        return found
