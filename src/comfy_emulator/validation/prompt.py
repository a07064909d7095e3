"""Which prompts ComfyUI takes, and in which words it refuses the others (`validate_prompt` of 0.8.0)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from comfy_emulator.error_details import full_type_name, traceback_lines
from comfy_emulator.graph_utils import is_link
from comfy_emulator.node_definitions import InputSpec, JsonObject, NodeInterfaces

LONGEST_LIST_IN_MESSAGE = 20
"""Longer lists of values are only counted in the message, not quoted."""

_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
_ANY_TYPES = {"*", "COMFY_MATCHTYPE_V3"}


class Verdict(NamedTuple):
    """What became of a prompt: refused with `error`, or taken with those of its `outputs` that are valid."""

    error: JsonObject | None
    outputs: list[str]
    node_errors: JsonObject


def types_fit(received: Any, wanted: Any) -> bool:
    """Tell whether an output of one type may feed an input of another; types may be joined by commas."""
    if received == wanted:
        return True
    if isinstance(received, list):
        return isinstance(wanted, str) and wanted in {"COMBO", *_ANY_TYPES}
    if isinstance(wanted, list):
        return received in _ANY_TYPES
    received_types, wanted_types = ({name.strip() for name in text.split(",")} for text in (received, wanted))
    return bool(received_types & wanted_types or _ANY_TYPES & (received_types | wanted_types))


def validate_prompt(
    prompt: Any, interfaces: NodeInterfaces, input_dir: Path, targets: Collection[str] | None = None
) -> Verdict:
    """Check a prompt, and convert its values in place to the types of their inputs (`"5"` to 5).

    Args:
        prompt: the graph in API format. Malformed beyond what ComfyUI checks, it raises what Python raises (a 500).
        interfaces: the nodes that there are.
        input_dir: where nodes look for their input files.
        targets: the output nodes to run; None for all.
    """
    outputs = []
    for node_id in prompt:
        refusal = _refuse_node(node_id, prompt[node_id], interfaces)
        if refusal is not None:
            return Verdict(refusal, [], {})
        if interfaces.is_output(prompt[node_id]["class_type"]) and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return Verdict(_prompt_error("prompt_no_outputs", "Prompt has no outputs", ""), [], {})
    return _validate_outputs(_Validation(prompt, interfaces, input_dir), outputs)


def _refuse_node(node_id: str, node: Any, interfaces: NodeInterfaces) -> JsonObject | None:
    if "class_type" not in node:
        message = "Cannot execute because a node is missing the class_type property."
    elif node["class_type"] not in interfaces:
        message = f"Cannot execute because node {node['class_type']} does not exist."
    else:
        return None
    return _prompt_error("invalid_prompt", message, f"Node ID '#{node_id}'")


def _prompt_error(kind: str, message: str, details: str) -> JsonObject:
    return {"type": kind, "message": message, "details": details, "extra_info": {}}


def _validate_outputs(validation: _Validation, outputs: list[str]) -> Verdict:
    good = []
    messages = []
    node_errors: JsonObject = {}
    for output in outputs:
        if validation.check_output(output):
            good.append(output)
            continue
        messages += [f"{reason['message']}: {reason['details']}" for reason in validation.results[output]]
        _note_node_errors(validation, output, node_errors)
    if good:
        return Verdict(None, good, node_errors)
    message = "Prompt outputs failed validation"
    return Verdict(_prompt_error("prompt_outputs_failed_validation", message, "\n".join(messages)), [], node_errors)


def _note_node_errors(validation: _Validation, output: str, node_errors: JsonObject) -> None:
    """Blame every node that has errors so far on this output too, whether it feeds it or not, as ComfyUI does."""
    for node_id, reasons in validation.results.items():
        if not reasons:
            continue
        entry = node_errors.setdefault(
            node_id,
            {
                "errors": reasons,
                "dependent_outputs": [],
                "class_type": validation.prompt[node_id]["class_type"],
            },
        )
        entry["dependent_outputs"].append(output)


@dataclass
class _Validation:
    """One walk over a prompt, from its outputs to their sources; each node is checked once."""

    prompt: Any
    interfaces: NodeInterfaces
    input_dir: Path
    results: dict[str, list[JsonObject]] = field(default_factory=dict)
    """Errors of each node that was checked; nodes that only have an invalid source have none."""
    invalid: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    """Nodes whose sources are being checked; meeting one again means a cycle, which is invalid without an error."""

    def check_output(self, node_id: str) -> bool:
        """Check an output node and what feeds it."""
        try:
            return self.check(node_id)
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

    def check(self, node_id: str) -> bool:
        """Check a node and what feeds it; an exception comes from a graph too broken to be checked."""
        if node_id in self.results:
            return node_id not in self.invalid
        if node_id in self.open:
            return False
        self.open.add(node_id)
        try:
            errors, sources_valid = self._check_node(node_id)
        finally:
            self.open.discard(node_id)
        self.results[node_id] = errors
        if errors or not sources_valid:
            self.invalid.add(node_id)
        return node_id not in self.invalid

    def _check_node(self, node_id: str) -> tuple[list[JsonObject], bool]:
        inputs = self.prompt[node_id]["inputs"]
        class_type = self.prompt[node_id]["class_type"]
        node = self.interfaces.node(class_type)
        errors: list[JsonObject] = []
        sources_valid = True
        for name, spec in self.interfaces.inputs(class_type).items():
            if name not in inputs:
                error = _missing(name) if spec.required else None
            elif isinstance(inputs[name], list):
                error = self._link_error(name, spec, inputs[name])
                if error is None and not self._check_source(name, spec, inputs[name]):
                    sources_valid = False
            else:
                error = _value_error(inputs, name, spec, checked_by_node=name in node.validates)
            if error is not None:
                errors.append(error)
        errors += self._custom_errors(class_type, inputs)
        return errors, sources_valid

    def _link_error(self, name: str, spec: InputSpec, link: list[Any]) -> JsonObject | None:
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _input_error(
                "bad_linked_input", message, name, name, input_config=spec.as_json(), received_value=link
            )
        received = self.interfaces.output_types(self.prompt[link[0]]["class_type"])[link[1]]
        if types_fit(received, spec.type):
            return None
        return _input_error(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{name}, received_type({received}) mismatch input_type({spec.type})",
            name,
            input_config=spec.as_json(),
            received_type=received,
            linked_node=link,
        )

    def _check_source(self, name: str, spec: InputSpec, link: list[Any]) -> bool:
        source = link[0]
        try:
            return self.check(source)
        except Exception as error:  # noqa: BLE001 - any exception is reported to the client, as in ComfyUI
            self._fail(
                source,
                _input_error(
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
        """Ask the node itself; its sentence is repeated for each input that it looked at."""
        node = self.interfaces.node(class_type)
        looked_at = {name: inputs[name] for name in inputs if name in node.validates and not is_link(inputs[name])}
        if node.validate is None or not looked_at:
            return []
        answer = node.validate(self.input_dir, **looked_at)
        if answer is True:
            return []
        reason = "" if answer is False else f" - {answer}"
        return [
            _input_error("custom_validation_failed", "Custom validation failed for node", f"{name}{reason}", name)
            for name in looked_at
        ]

    def _fail(self, node_id: str, error: JsonObject) -> None:
        self.results[node_id] = [error]
        self.invalid.add(node_id)


def _missing(name: str) -> JsonObject:
    return _input_error("required_input_missing", "Required input is missing", name, name)


def _input_error(kind: str, message: str, details: str, name: str, **extra: Any) -> JsonObject:
    return {"type": kind, "message": message, "details": details, "extra_info": {"input_name": name, **extra}}


def _value_error(inputs: JsonObject, name: str, spec: InputSpec, *, checked_by_node: bool) -> JsonObject | None:
    """Convert a constant in place, then check its range and its list of values unless the node does so itself."""
    if isinstance(inputs[name], dict) and "__value__" in inputs[name]:  # how a list is sent that is no link
        inputs[name] = inputs[name]["__value__"]
    try:
        inputs[name] = _converted(inputs[name], spec.type)
    except Exception as error:  # noqa: BLE001 - a conversion may raise anything, and all is reported to the client
        return _input_error(
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


def _converted(value: Any, kind: Any) -> Any:
    convert = _CONVERSIONS.get(kind) if isinstance(kind, str) else None
    return value if convert is None else convert(value)


def _range_error(value: Any, name: str, spec: InputSpec) -> JsonObject | None:
    if "min" in spec.options and value < spec.options["min"]:
        kind, message = "value_smaller_than_min", f"Value {value} smaller than min of {spec.options['min']}"
    elif "max" in spec.options and value > spec.options["max"]:
        kind, message = "value_bigger_than_max", f"Value {value} bigger than max of {spec.options['max']}"
    else:
        return None
    return _input_error(kind, message, name, name, input_config=spec.as_json(), received_value=value)


def _list_error(value: Any, name: str, spec: InputSpec) -> JsonObject | None:
    values = spec.values
    if values is None or value in values:
        return None
    quoted = len(values) <= LONGEST_LIST_IN_MESSAGE
    listed = str(values) if quoted else f"(list of length {len(values)})"
    return _input_error(
        "value_not_in_list",
        "Value not in list",
        f"{name}: '{value}' not in {listed}",
        name,
        input_config=spec.as_json() if quoted else None,
        received_value=value,
    )
