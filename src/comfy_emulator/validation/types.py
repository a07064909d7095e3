"""Which output types fit which input types (`comfy_execution/validation.py` of ComfyUI)."""

from __future__ import annotations

from typing import Any

_ANY_TYPES = {"*", "COMFY_MATCHTYPE_V3"}


def validate_node_input(received_type: Any, input_type: Any) -> bool:
    """Return whether an output may be linked to an input; a type may be several, separated by commas."""
    if received_type == input_type:
        return True
    if isinstance(received_type, list):
        return isinstance(input_type, str) and input_type in {"COMBO", *_ANY_TYPES}
    if isinstance(input_type, list):
        return received_type in _ANY_TYPES
    received, accepted = ({name.strip() for name in types.split(",")} for types in (received_type, input_type))
    return bool(received & accepted or _ANY_TYPES & (received | accepted))
