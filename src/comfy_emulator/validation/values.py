"""Validation of constants: type, range and list of values (`validate_inputs` of ComfyUI's `execution.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from comfy_emulator.json_types import JsonObject
from comfy_emulator.node_definitions import InputSpec

LONGEST_LIST_IN_MESSAGE = 20
"""The message quotes lists of values up to this length, and the length of longer ones."""

_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def input_error(kind: str, message: str, details: str, name: str, **extra_info: Any) -> JsonObject:
    """Return an error of the input `name`."""
    return {"type": kind, "message": message, "details": details, "extra_info": {"input_name": name, **extra_info}}


def value_error(inputs: JsonObject, name: str, spec: InputSpec, *, checked_by_node: bool) -> JsonObject | None:
    """Convert a constant in place, and return its error, if any.

    Args:
        inputs: the inputs of the node.
        name: the input.
        spec: its definition.
        checked_by_node: whether the node's `VALIDATE_INPUTS` checks range and list of values instead.
    """
    if isinstance(inputs[name], dict) and "__value__" in inputs[name]:  # the frontend wraps lists that are not links
        inputs[name] = inputs[name]["__value__"]
    try:
        convert = _CONVERSIONS.get(spec.type) if isinstance(spec.type, str) else None
        if convert is not None:
            inputs[name] = convert(inputs[name])
    except Exception as error:  # noqa: BLE001 - any exception is reported to the client, as in ComfyUI
        return input_error(
            "invalid_input_type",
            f"Failed to convert an input value to a {spec.type} value",
            f"{name}, {inputs[name]}, {error}",
            name,
            input_config=spec.as_json(),
            received_value=inputs[name],
            exception_message=str(error),
        )
    if checked_by_node:
        return None
    return _range_error(inputs[name], name, spec) or _list_error(inputs[name], name, spec)


def _range_error(value: Any, name: str, spec: InputSpec) -> JsonObject | None:
    if "min" in spec.options and value < spec.options["min"]:
        kind, message = "value_smaller_than_min", f"Value {value} smaller than min of {spec.options['min']}"
    elif "max" in spec.options and value > spec.options["max"]:
        kind, message = "value_bigger_than_max", f"Value {value} bigger than max of {spec.options['max']}"
    else:
        return None
    return input_error(kind, message, name, name, input_config=spec.as_json(), received_value=value)


def _list_error(value: Any, name: str, spec: InputSpec) -> JsonObject | None:
    values = spec.values
    if values is None or value in values:
        return None
    is_short = len(values) <= LONGEST_LIST_IN_MESSAGE
    listed = str(values) if is_short else f"(list of length {len(values)})"
    return input_error(
        "value_not_in_list",
        "Value not in list",
        f"{name}: '{value}' not in {listed}",
        name,
        input_config=spec.as_json() if is_short else None,
        received_value=value,
    )
