"""Turns ComfyUI's validation errors into sentences that say what to change. No I/O.

The types of error and their fields are those of ComfyUI's `execution.validate_prompt` and `validate_inputs`, recorded
from 0.3.64 and 0.8.0.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from comfy_worker.comfy.requirements import CANVAS_ONLY, combo_values, inputs_of, missing_models, model_folder
from comfy_worker.errors import InvalidWorkflow, MissingModels, MissingNodes
from comfy_worker.graph.file_references import MODEL_FILE
from comfy_worker.graph.workflow import class_type, find_loop, node_names, title
from comfy_worker.types import Workflow

_MAX_CHOICES = 10
_MAX_OUTPUTS = 10
_MAX_PROBLEMS = 50
"""Problems in one error: finding the nearest names takes time, and nobody reads more."""
_MAX_NAME_LENGTH = 255
"""A longer value is not a misspelled name."""
_MISSING_NODE = "missing_node_type"
_NOT_IN_LIST = "value_not_in_list"

ObjectInfo = Callable[[], Mapping[str, Any]]
"""Returns `/object_info`; called only if the validation error lacks something."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a workflow.

    Attributes:
        type: ComfyUI's name for it.
        message: what is wrong, without node and input.
        given: the value that was sent.
        choices: up to ten of the `choice_count` possible values.
        nearest: the possible value that is most like `given`.
        belongs_to: the folder below ComfyUI's `models/` that it belongs to.
    """

    type: str
    message: str
    node_id: str = ""
    class_type: str = ""
    title: str = ""
    input_name: str = ""
    given: Any = None
    choices: tuple[str, ...] = ()
    choice_count: int = 0
    nearest: str | None = None
    belongs_to: str | None = None

    @property
    def is_missing_node(self) -> bool:
        """Whether ComfyUI does not have a node class."""
        return self.type == _MISSING_NODE

    @property
    def is_missing_model(self) -> bool:
        """Whether ComfyUI does not have a model file."""
        return self.type == _NOT_IN_LIST and bool(MODEL_FILE.search(str(self.given)))

    def __str__(self) -> str:
        """Return the whole sentence, in the form "Node 30 (ckpt_name): …"."""
        notes = [note for note in (self._available(), self.belongs_to) if note]
        sentence = f"{self.message} ({'; '.join(notes)})" if notes else self.message
        if self.nearest:
            sentence += f"; did you mean {self.nearest!r}?"
        if not self.node_id:
            return sentence
        where = f"Node {self.node_id} ({self.input_name})" if self.input_name else f"Node {self.node_id}"
        return f"{where}: {sentence}"

    def _available(self) -> str:
        """Return the values that ComfyUI accepts, for a value that is not in a list."""
        if self.type != _NOT_IN_LIST:
            return ""
        more = ", …" if self.choice_count > len(self.choices) else ""
        return f"{self.class_type} has {', '.join(map(repr, self.choices)) or 'none'}{more}"

    def as_details(self) -> dict[str, Any]:
        """Return the problem as JSON, without the fields that do not apply."""
        details = {name: value for name, value in vars(self).items() if value or name == "type"}
        # A given 0, false or "" is kept.
        return details if self.given is None else {**details, "given": self.given}


def refusal(body: Mapping[str, Any], workflow: Workflow, object_info: ObjectInfo) -> InvalidWorkflow:
    """Return the error for a 400 response of `/prompt`: all problems in one sentence, and each in `details`.

    ComfyUI stops at the first class that it does not have; the others are looked up here.
    """
    object_info = functools.cache(object_info)
    found = node_problems(body.get("node_errors") or {}, workflow, object_info)
    problems = list(itertools.islice(found, _MAX_PROBLEMS))
    if not problems and _is_missing_class(body.get("error") or {}):
        found = _missing_classes_and_models(workflow, object_info())
        problems = list(itertools.islice(found, _MAX_PROBLEMS))
    problems = problems or [_whole_problem(body.get("error") or {}, workflow)]
    sentences = [str(problem) for problem in problems]
    if next(found, None) is not None:
        sentences.append("and there are more problems")
    return _error_class(problems)(
        f"Workflow validation failed: {'; '.join(sentences)}",
        details={"problems": [problem.as_details() for problem in problems]},
        hint=_hint(problems),
    )


def _error_class(problems: Sequence[Problem]) -> type[InvalidWorkflow]:
    if any(problem.is_missing_node for problem in problems):
        return MissingNodes
    if any(problem.is_missing_model for problem in problems):
        return MissingModels
    return InvalidWorkflow


def _hint(problems: Sequence[Problem]) -> str | None:
    if any(problem.message.startswith("Invalid ") and " file: " in problem.message for problem in problems):
        return "Send the file in input.images, under the name that the workflow has for it"
    return None


def skipped_outputs(node_errors: Mapping[str, Any], workflow: Workflow, object_info: ObjectInfo) -> list[str]:
    """Return a warning for each of the `node_errors` of a 200 response: ComfyUI skips the outputs that depend on it."""
    warnings = []
    object_info = functools.cache(object_info)
    for problem in itertools.islice(node_problems(node_errors, workflow, object_info), _MAX_PROBLEMS):
        outputs = [str(output) for output in node_errors[problem.node_id].get("dependent_outputs") or [problem.node_id]]
        skipped = ", ".join(f"{output} ({title(workflow, output)})" for output in outputs[:_MAX_OUTPUTS])
        more = ", …" if len(outputs) > _MAX_OUTPUTS else ""
        warnings.append(f"{problem}; ComfyUI skipped output node {skipped}{more}")
    return warnings


def node_problems(node_errors: Mapping[str, Any], workflow: Workflow, object_info: ObjectInfo) -> Iterator[Problem]:
    """Yield every problem that ComfyUI found, in the order of the workflow: ComfyUI's own order is random."""
    order = {node_id: index for index, node_id in enumerate(workflow)}
    for node_id, node in sorted(node_errors.items(), key=lambda item: order.get(str(item[0]), len(order))):
        problems = [
            _node_problem(str(node_id), str(node.get("class_type", "")), error, workflow, object_info)
            for error in node.get("errors") or []
        ]
        inputs = {name: index for index, name in enumerate(workflow.get(str(node_id), {}).get("inputs", {}))}
        yield from sorted(problems, key=lambda problem: inputs.get(problem.input_name, len(inputs)))


def _node_problem(
    node_id: str, node_class: str, error: Mapping[str, Any], workflow: Workflow, object_info: ObjectInfo
) -> Problem:
    extra = error.get("extra_info") or {}
    kind = str(error.get("type", ""))
    input_name = str(extra.get("input_name") or "")
    if kind == "required_input_missing" and not input_name:
        input_name = str(error.get("details", "")).partition(" ")[0]
    if kind == _NOT_IN_LIST:
        values = combo_values(extra.get("input_config"))
        if values is None:  # ComfyUI omits long lists
            values = combo_values(inputs_of(object_info().get(node_class, {})).get(input_name)) or []
        return _not_in_list(node_id, input_name, extra.get("received_value"), values, workflow)
    if kind.startswith("exception_during"):
        # ComfyUI names the input through which it reached the node, not the cause.
        input_name = ""
    return Problem(
        type=kind,
        message=_message(kind, error, extra, workflow),
        **node_names(workflow, node_id),
        input_name=input_name,
        given=extra.get("received_value"),
    )


def _not_in_list(node_id: str, input_name: str, given: Any, values: Sequence[str], workflow: Workflow) -> Problem:
    node_class = class_type(workflow, node_id)
    is_model = bool(MODEL_FILE.search(str(given)))
    folder = model_folder(node_class, input_name) if is_model else None
    return Problem(
        type=_NOT_IN_LIST,
        message=f"{given!r} not in available {'models' if is_model else 'values'}",
        **node_names(workflow, node_id),
        input_name=input_name,
        given=given,
        choices=tuple(values[:_MAX_CHOICES]),
        choice_count=len(values),
        nearest=nearest(str(given), values),
        belongs_to=f"they lie in models/{folder}" if folder else None,
    )


def _message(kind: str, error: Mapping[str, Any], extra: Mapping[str, Any], workflow: Workflow) -> str:
    given = extra.get("received_value")
    config = extra.get("input_config")
    details = str(error.get("details", ""))
    if kind == "required_input_missing":
        return "required input is missing"
    if kind in ("value_smaller_than_min", "value_bigger_than_max"):
        bound, word = ("min", "smaller than the least") if kind.endswith("min") else ("max", "bigger than the greatest")
        return f"{given!r} is {word} allowed value {_option(config, bound)}"
    if kind == "invalid_input_type":
        return f"{given!r} is not of type {_type_name(config)}"
    if kind == "return_type_mismatch":
        link = extra.get("linked_node") or ["?", 0]
        return (
            f"takes {_type_name(config)}, but output {link[1]} of node {link[0]} "
            f"({class_type(workflow, str(link[0]))}) is {extra.get('received_type')}"
        )
    if kind == "custom_validation_failed":
        return details.partition(" - ")[2] or "the node does not take this value"
    if kind in ("exception_during_inner_validation", "exception_during_validation"):
        return _exception_message(extra, details, workflow)
    return f"{error.get('message', kind)}: {details}" if details else str(error.get("message", kind))


def _exception_message(extra: Mapping[str, Any], details: str, workflow: Workflow) -> str:
    missing = details.strip("'")
    if extra.get("exception_type") == "KeyError" and missing not in workflow:
        return f"it is linked to node {missing}, which the workflow does not have"
    return f"ComfyUI could not check it: {extra.get('exception_type', 'error')}: {details}"


def _option(config: Any, name: str) -> Any:
    return config[1].get(name) if isinstance(config, Sequence) and len(config) > 1 else None


def _type_name(config: Any) -> str:
    return str(config[0]) if isinstance(config, Sequence) and config else "another type"


# ----------------------------------------------------------------------------------------- whole workflow


def _is_missing_class(error: Mapping[str, Any]) -> bool:
    # Newer ComfyUIs have a type for it, older ones only a message.
    return error.get("type") == _MISSING_NODE or "does not exist" in str(error.get("message", ""))


def _missing_classes_and_models(workflow: Workflow, object_info: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield every class and every model file that the workflow needs and ComfyUI does not have."""
    for node_id in workflow:
        node_class = class_type(workflow, node_id)
        if node_class in object_info:
            continue
        message = f"node class {node_class!r} does not exist here"
        if node_class in CANVAS_ONLY:
            message = f"{node_class!r} exists on ComfyUI's canvas only: use Workflow > Export (API)"
        yield Problem(
            type=_MISSING_NODE,
            message=message,
            **node_names(workflow, node_id),
            given=node_class,
            nearest=nearest(node_class, object_info),
        )
    for node_id, input_name, given, choices in missing_models(workflow, object_info):
        yield _not_in_list(node_id, input_name, given, choices, workflow)


def _whole_problem(error: Mapping[str, Any], workflow: Workflow) -> Problem:
    """Return the problem of a refusal that names no node's input."""
    kind, message, details = (str(error.get(key, "")) for key in ("type", "message", "details"))
    node = re.search(r"Node ID '#([^']*)'", details)
    node_id = node[1] if node else ""
    node_class = class_type(workflow, node_id)
    if kind == "prompt_no_outputs":
        return Problem(kind, "the workflow has no output node, such as SaveImage")
    if loop := find_loop(workflow):
        return Problem(kind, _loop_message(loop), node_id=loop[0])
    sentence = f"{message} {details}".strip() or "ComfyUI gave no reason"
    return Problem(kind, sentence, node_id=node_id, class_type=node_class)


def _loop_message(loop: Sequence[str]) -> str:
    return f"nodes {', '.join(loop)} feed each other in a circle" if len(loop) > 1 else "it feeds itself"


def nearest(given: str, values: Iterable[str]) -> str | None:
    """Return the value that is most like `given`, ignoring case, folders and the extensions of model files."""
    if len(given) > _MAX_NAME_LENGTH:
        return None
    by_key: dict[str, list[str]] = {}
    for value in values:
        by_key.setdefault(_key(value), []).append(value)
    found = get_close_matches(_key(given), by_key, n=1, cutoff=0.65)
    # Of several files with the same name, take the one whose folder is most alike.
    return get_close_matches(given, by_key[found[0]], n=1, cutoff=0.0)[0] if found else None


def _key(value: str) -> str:
    return MODEL_FILE.sub("", re.split(r"[/\\]", value)[-1]).lower()
