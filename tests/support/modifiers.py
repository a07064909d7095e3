"""What a modifier makes, for tests that look at its workflow alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_worker.gateway.modifiers import Modifiers, run_modifier


def workflow_made_by(
    modifiers: Modifiers, name: str, modifications: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Return the workflow that a modifier makes."""
    return run_modifier(modifiers, name, modifications, **options).workflow
