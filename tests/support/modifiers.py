"""What a modifier makes, for tests that look at its workflow alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_worker.modifiers import Modifiers, apply


def made_by(
    modifiers: Modifiers, name: str, modifications: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Return the workflow that a modifier makes."""
    return apply(modifiers, name, modifications, **options).workflow
