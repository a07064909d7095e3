"""Validation of a whole prompt (`validate_prompt` of ComfyUI's `execution.py`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.json_types import JsonObject
from comfy_emulator.node_definitions import NodeDefinitions
from comfy_emulator.validation.inputs import InputValidator


class ValidationResult(NamedTuple):
    """A prompt is refused with `error`, or accepted with those of its outputs that are valid."""

    error: JsonObject | None
    good_outputs: list[str]
    node_errors: JsonObject


def validate_prompt(
    prompt: Any, definitions: NodeDefinitions, folders: FolderPaths, targets: Collection[str] | None = None
) -> ValidationResult:
    """Check a prompt, and convert its values in place to the types of their inputs (`"5"` to 5).

    Args:
        prompt: the graph in API format. One that is more malformed than ComfyUI checks raises any exception (a 500).
        definitions: the nodes.
        folders: where nodes look for their input files.
        targets: the output nodes to run (`partial_execution_targets`); None for all.
    """
    outputs = []
    for node_id in prompt:
        error = _node_class_error(node_id, prompt[node_id], definitions)
        if error is not None:
            return ValidationResult(error, [], {})
        if definitions.is_output_node(prompt[node_id]["class_type"]) and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return ValidationResult(_prompt_error("prompt_no_outputs", "Prompt has no outputs", ""), [], {})
    return _validate_outputs(InputValidator(prompt, definitions, folders), outputs)


def _node_class_error(node_id: str, node: Any, definitions: NodeDefinitions) -> JsonObject | None:
    if "class_type" not in node:
        message = "Cannot execute because a node is missing the class_type property."
    elif node["class_type"] not in definitions:
        message = f"Cannot execute because node {node['class_type']} does not exist."
    else:
        return None
    return _prompt_error("invalid_prompt", message, f"Node ID '#{node_id}'")


def _prompt_error(kind: str, message: str, details: str) -> JsonObject:
    return {"type": kind, "message": message, "details": details, "extra_info": {}}


def _validate_outputs(validator: InputValidator, outputs: list[str]) -> ValidationResult:
    good_outputs = []
    details = []
    node_errors: JsonObject = {}
    for output in outputs:
        if validator.validate_output(output):
            good_outputs.append(output)
            continue
        details += [f"{error['message']}: {error['details']}" for error in validator.errors[output]]
        _add_node_errors(validator, output, node_errors)
    if good_outputs:
        return ValidationResult(None, good_outputs, node_errors)
    message = "Prompt outputs failed validation"
    error = _prompt_error("prompt_outputs_failed_validation", message, "\n".join(details))
    return ValidationResult(error, [], node_errors)


def _add_node_errors(validator: InputValidator, output: str, node_errors: JsonObject) -> None:
    """Add the output to all nodes with errors so far, even to those that it does not depend on, as ComfyUI does."""
    for node_id, errors in validator.errors.items():
        if not errors:
            continue
        class_type = validator.prompt[node_id]["class_type"]
        entry = node_errors.setdefault(node_id, {"errors": errors, "dependent_outputs": [], "class_type": class_type})
        entry["dependent_outputs"].append(output)
