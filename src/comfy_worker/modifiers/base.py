"""The class that modifiers are made from."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from comfy_worker.errors import InvalidInput
from comfy_worker.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.modifiers.random_ints import HIGHEST, RANDOM_INT, fill_random_ints
from comfy_worker.modifiers.values import RecordedValues
from comfy_worker.strict_json import InvalidJson, parse_json

_URL = re.compile(r"https?://", re.IGNORECASE)
_ON_COMFYUIS_DISK = ("input_dir", "download_file", "find_input_file", "list_files_in_directory", "get_file_extension")
"""What AI-Dock's class has for ComfyUI's input folder, which lies on the worker's machine."""


class BaseModifier:
    """Makes a workflow out of a file and the caller's `modifications`.

    The contract is that of the AI-Dock ComfyUI API wrapper. A modifier written for it runs as it is, also with its own
    import line, `from modifiers.basemodifier import BaseModifier`.

    Attributes:
        WORKFLOW_JSON: the workflow's file, in API format; "" for a modifier that changes the workflow it is sent.
        RANDOM_INT_PLACEHOLDER: stands for a random integer in the workflow.
        RANDOM_INT_MIN: the lowest of these integers.
        RANDOM_INT_MAX: the highest.
        workflow_folders: where a relative `WORKFLOW_JSON` is looked for, in this order; set by who runs the modifier.
        modifications: the caller's values.
        workflow: the graph, a copy that may be changed; loaded before `apply_modifications` runs.
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
        if name in _ON_COMFYUIS_DISK:
            raise ModifierFailed(
                f"Modifier {self._name} uses {name}, but ComfyUI's folders are on another machine",
                hint="Leave the URL in the workflow: the worker downloads it",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    async def load_workflow(self, workflow: Mapping[str, Any] | None = None) -> None:
        """Set `self.workflow` from the file, or from a copy of `workflow` for a modifier without a file.

        Raises:
            InvalidInput: there is neither.
            ModifierFailed: the file is not there, or is no JSON object.
        """
        if self.WORKFLOW_JSON:
            self.workflow = self._read_workflow()
        elif workflow:
            self.workflow = copy.deepcopy(dict(workflow))
        else:
            raise InvalidInput(f"Modifier {self._name} has no workflow of its own and was sent none")

    async def modify_workflow_value(self, key: str, default: Any = None) -> Any:
        """Return the caller's value for `key`, or else `default`.

        A `default` of None is no default: the value is required then. A key that is an http(s) URL needs none, it
        stands for itself.

        Raises:
            MissingValue: the caller sent no such value and there is no default; it names the modifier and the value.
        """
        if key in self.modifications:
            return self.modifications[key]
        if default is not None:
            return default
        if _URL.match(key):
            return key
        raise MissingValue(f"Modifier {self._name} needs the value {key!r}", hint=f"Send it as modifications.{key}")

    async def apply_modifications(self) -> None:
        """Take care of the workflow's URLs and random integers; modifiers call this after their own changes."""
        self.workflow = await self.replace_workflow_urls(self.workflow)
        self.replace_random_ints(self.workflow)

    async def get_modified_workflow(self) -> dict[str, Any]:
        """Apply the modifications and return the workflow."""
        await self.apply_modifications()
        return self.workflow

    def replace_random_ints(self, data: Any) -> Any:
        """Put random integers in place of `__RANDOM_INT__` anywhere in `data`, in place, and return it."""
        return fill_random_ints(data, self.RANDOM_INT_MIN, self.RANDOM_INT_MAX, self.RANDOM_INT_PLACEHOLDER)

    async def replace_workflow_urls(self, data: Any) -> Any:
        """Return `data` as it is: its URLs are downloaded, and replaced by files' names, on the worker's machine."""
        return data

    async def get_url_content(self, url: str) -> str:
        """Return what stands for a URL's content in a workflow: the URL, in whose place the worker puts the file."""
        return url

    def is_url(self, value: Any) -> bool:
        """Return whether a value is a URL."""
        try:
            parts = urlsplit(value)
        except (ValueError, AttributeError, TypeError):
            return False
        return bool(parts.scheme and parts.netloc)

    def get_url_hash(self, url: str) -> str:
        """Return the MD5 of a URL, in hexadecimal digits."""
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
            raise ModifierFailed(f"Modifier {self._name} has a workflow that is no object of nodes: {file.name}")
        return workflow

    def _find_workflow(self) -> Path:
        # An absolute name stays as it is behind any folder.
        places = [folder / self.WORKFLOW_JSON for folder in self.workflow_folders] or [Path(self.WORKFLOW_JSON)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ModifierFailed(f"Modifier {self._name} finds no workflow {Path(self.WORKFLOW_JSON).name}")
        return found
