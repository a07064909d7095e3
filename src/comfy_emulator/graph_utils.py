"""Links between the nodes of a prompt (`comfy_execution/graph_utils.py` of ComfyUI)."""

from __future__ import annotations

from typing import Any


def is_link(value: Any) -> bool:
    """Return whether an input's value is a link, `[node_id, output_slot]`, and not a constant."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int | float)
    )
