"""Nodes for plain values (`comfy_extras/nodes_primitive.py`, `nodes_string.py`, `nodes_preview_any.py`)."""

from __future__ import annotations

import json
from typing import Any

from comfy_emulator.node_api import NodeContext, NodeResult
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.tensor_text import describe


@REGISTRY.add("PrimitiveInt")
@REGISTRY.add("PrimitiveFloat")
@REGISTRY.add("PrimitiveString")
@REGISTRY.add("PrimitiveStringMultiline")
@REGISTRY.add("PrimitiveBoolean")
def primitive(_context: NodeContext, value: Any) -> NodeResult:
    """Return the value."""
    return NodeResult((value,))


@REGISTRY.add("StringConcatenate")
def string_concatenate(_context: NodeContext, string_a: str, string_b: str, delimiter: str) -> NodeResult:
    """Join two texts with a delimiter."""
    return NodeResult((f"{string_a}{delimiter}{string_b}",))


@REGISTRY.add("PreviewAny")
def preview_any(_context: NodeContext, source: Any = None) -> NodeResult:
    """Show a value as text: itself, otherwise JSON, otherwise as Python prints it."""
    return NodeResult(ui={"text": [_as_text(source)]})


def _as_text(source: object) -> str:
    if isinstance(source, str):
        return source
    if source is None or isinstance(source, (int, float)):
        return str(source)
    try:
        return json.dumps(source, indent=4)
    except (TypeError, ValueError):  # not JSON
        return describe(source)
