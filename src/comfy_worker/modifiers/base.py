"""The class that modifiers are made from."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.modifiers.random_ints import fill_random_ints

_URL = re.compile(r"https?://", re.IGNORECASE)


class BaseModifier:
    """Makes a workflow out of a file and the caller's `modifications`.

    The contract (`WORKFLOW_JSON`, `modify_workflow_value`, `apply_modifications`) is that of the AI-Dock ComfyUI API
    wrapper, so that a modifier written for it needs only another import line.

    Attributes:
        WORKFLOW_JSON: the workflow's file, in API format; "" for a modifier that changes the workflow it is sent.
        workflow_folders: where a relative `WORKFLOW_JSON` is looked for, in this order; set by who runs the modifier.
        modifications: the caller's values.
        workflow: the graph, a copy that may be changed; loaded before `apply_modifications` runs.
    """

    WORKFLOW_JSON: str = ""
    workflow_folders: Sequence[Path] = ()

    def __init__(self, modifications: Mapping[str, Any] | None = None) -> None:
        self.modifications: dict[str, Any] = dict(modifications or {})
        self.workflow: dict[str, Any] = {}

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
        """Put random integers in place of `__RANDOM_INT__`; modifiers call this after their own changes.

        URLs are left as they are: the worker fetches those of a workflow when it stages the job, wherever a node loads
        a file.
        """
        self.replace_random_ints(self.workflow)

    async def get_modified_workflow(self) -> dict[str, Any]:
        """Apply the modifications and return the workflow."""
        await self.apply_modifications()
        return self.workflow

    def replace_random_ints(self, data: Any) -> Any:
        """Put random integers in place of `__RANDOM_INT__` anywhere in `data`, in place, and return it."""
        return fill_random_ints(data)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _read_workflow(self) -> dict[str, Any]:
        file = self._find_workflow()
        try:
            workflow = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
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
