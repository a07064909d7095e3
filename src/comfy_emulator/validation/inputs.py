"""Validation of the inputs of nodes (`validate_inputs` of ComfyUI's `execution.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comfy_emulator.error_details import full_type_name, traceback_lines
from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.graph_utils import is_link
from comfy_emulator.json_types import JsonObject
from comfy_emulator.node_definitions import InputSpec, NodeDefinitions
from comfy_emulator.validation.types import validate_node_input
from comfy_emulator.validation.values import input_error, value_error


@dataclass
class InputValidator:
    """Validates nodes and, recursively, the nodes before them; each node once."""

    prompt: Any
    definitions: NodeDefinitions
    folders: FolderPaths
    errors: dict[str, list[JsonObject]] = field(default_factory=dict)
    """The errors of each validated node; a node whose only fault is an invalid source has none."""
    _invalid: set[str] = field(default_factory=set)
    _visiting: set[str] = field(default_factory=set)
    """The nodes that are being validated; meeting one again means a cycle, for which ComfyUI 0.8 reports no error."""

    def validate_output(self, node_id: str) -> bool:
        """Return whether an output node and all nodes before it are valid."""
        try:
            return self._validate(node_id)
        except Exception as error:  # noqa: BLE001 - any exception is reported to the client, as in ComfyUI
            self._fail(
                node_id,
                {
                    "type": "exception_during_validation",
                    "message": "Exception when validating node",
                    "details": str(error),
                    "extra_info": {
                        "exception_type": full_type_name(type(error)),
                        "traceback": traceback_lines(error.__traceback__),
                    },
                },
            )
            return False

    def _validate(self, node_id: str) -> bool:
        """Return whether a node and all nodes before it are valid; a malformed graph raises any exception."""
        if node_id in self.errors:
            return node_id not in self._invalid
        if node_id in self._visiting:
            return False
        self._visiting.add(node_id)
        try:
            errors, sources_valid = self._validate_inputs(node_id)
        finally:
            self._visiting.discard(node_id)
        self.errors[node_id] = errors
        if errors or not sources_valid:
            self._invalid.add(node_id)
        return node_id not in self._invalid

    def _validate_inputs(self, node_id: str) -> tuple[list[JsonObject], bool]:
        inputs = self.prompt[node_id]["inputs"]
        class_type = self.prompt[node_id]["class_type"]
        node = self.definitions.node(class_type)
        errors: list[JsonObject] = []
        sources_valid = True
        for name, spec in self.definitions.inputs(class_type).items():
            if name not in inputs:
                missing = input_error("required_input_missing", "Required input is missing", name, name)
                error = missing if spec.required else None
            elif isinstance(inputs[name], list):
                error = self._link_error(name, spec, inputs[name])
                if error is None and not self._validate_source(name, spec, inputs[name]):
                    sources_valid = False
            else:
                error = value_error(inputs, name, spec, checked_by_node=name in node.validates)
            if error is not None:
                errors.append(error)
        errors += self._custom_errors(class_type, inputs)
        return errors, sources_valid

    def _link_error(self, name: str, spec: InputSpec, link: list[Any]) -> JsonObject | None:
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return input_error(
                "bad_linked_input", message, name, name, input_config=spec.as_json(), received_value=link
            )
        received = self.definitions.output_types(self.prompt[link[0]]["class_type"])[link[1]]
        if validate_node_input(received, spec.type):
            return None
        return input_error(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{name}, received_type({received}) mismatch input_type({spec.type})",
            name,
            input_config=spec.as_json(),
            received_type=received,
            linked_node=link,
        )

    def _validate_source(self, name: str, spec: InputSpec, link: list[Any]) -> bool:
        source = link[0]
        try:
            return self._validate(source)
        except Exception as error:  # noqa: BLE001 - any exception is reported to the client, as in ComfyUI
            self._fail(
                source,
                input_error(
                    "exception_during_inner_validation",
                    "Exception when validating inner node",
                    str(error),
                    name,
                    input_config=spec.as_json(),
                    exception_message=str(error),
                    exception_type=full_type_name(type(error)),
                    traceback=traceback_lines(error.__traceback__),
                    linked_node=link,
                ),
            )
            return False

    def _custom_errors(self, class_type: str, inputs: JsonObject) -> list[JsonObject]:
        """Call the node's `VALIDATE_INPUTS`; its error is repeated for each input that it checks."""
        node = self.definitions.node(class_type)
        checked = {name: inputs[name] for name in inputs if name in node.validates and not is_link(inputs[name])}
        if node.validate is None or not checked:
            return []
        result = node.validate(self.folders, **checked)
        if result is True:
            return []
        reason = "" if result is False else f" - {result}"
        return [
            input_error("custom_validation_failed", "Custom validation failed for node", f"{name}{reason}", name)
            for name in checked
        ]

    def _fail(self, node_id: str, error: JsonObject) -> None:
        self.errors[node_id] = [error]
        self._invalid.add(node_id)
