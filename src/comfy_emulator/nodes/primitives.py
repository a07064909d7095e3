"""Nodes for plain values: numbers, texts, and showing any value as text."""

from __future__ import annotations

import json
from typing import Any

from comfy_emulator.node_api import Context, NodeResult
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.tensor_text import describe


@REGISTRY.add("PrimitiveInt")
@REGISTRY.add("PrimitiveFloat")
@REGISTRY.add("PrimitiveString")
@REGISTRY.add("PrimitiveStringMultiline")
@REGISTRY.add("PrimitiveBoolean")
def primitive(_context: Context, value: Any) -> NodeResult:
    """The value itself."""
    return NodeResult((value,))


@REGISTRY.add("StringConcatenate")
def string_concatenate(_context: Context, string_a: str, string_b: str, delimiter: str) -> NodeResult:
    """Two texts with a delimiter between them."""
    return NodeResult((f"{string_a}{delimiter}{string_b}",))


@REGISTRY.add("PreviewAny")
def preview_any(_context: Context, source: Any = None) -> NodeResult:
    """Any value as a text: itself, JSON where that can be, otherwise as Python prints it."""
    return NodeResult(ui={"text": [_as_text(source)]})


def _as_text(source: object) -> str:
    if isinstance(source, str):
        return source
    if source is None or isinstance(source, (int, float)):
        return str(source)
    try:
        return json.dumps(source, indent=4)
    except (TypeError, ValueError):  # not made of JSON's types
        return describe(source)
