"""A parameter of a named workflow: which values it accepts, and which inputs of the graph it sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)

from comfy_worker.errors import InvalidInput
from comfy_worker.graph.file_references import is_fetched
from comfy_worker.job.input_files import decode_base64

ParameterType = Literal["string", "integer", "number", "boolean", "choice", "file"]
Value: TypeAlias = StrictBool | StrictInt | StrictFloat | StrictStr

_MAX_NUMBER = 2**64
"""The largest absolute value of a number; ComfyUI's seeds need 64 bits. It also keeps a map's results finite."""
Number = Annotated[StrictInt | StrictFloat, Field(ge=-_MAX_NUMBER, le=_MAX_NUMBER)]

RANDOM_INT = "__RANDOM_INT__"
"""A default that stands for a new random number in each request."""
_LARGEST_RANDOM = 2**53 - 1
"""The largest integer that every JSON parser reads exactly."""
_PLACEHOLDER = "{value}"


class Strict(BaseModel):
    """A model that rejects unknown keys, which are typing errors in a manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(Strict):
    """An input of a node."""

    node: StrictStr
    input: StrictStr


class NumberMap(Strict):
    """The number times `multiply`, rounded to a multiple of `multiple_of`, plus `add`."""

    multiply: Number = 1
    multiple_of: Annotated[StrictInt, Field(gt=0)] | None = None
    add: Number = 0

    def apply(self, value: float) -> float:
        """Return the mapped number; an integer if `multiple_of` and `add` are."""
        product = value * self.multiply
        if self.multiple_of is not None:
            product = math.floor(product / self.multiple_of + 0.5) * self.multiple_of
        return product + self.add


class TextMap(Strict):
    """A text in which the value replaces `{value}`; an empty value stays empty."""

    text: StrictStr

    @model_validator(mode="after")
    def _has_placeholder(self) -> TextMap:
        if _PLACEHOLDER not in self.text:
            raise ValueError(f"text must have a {_PLACEHOLDER}")
        return self

    def apply(self, value: str) -> str:
        """Return the text with the value."""
        return self.text.replace(_PLACEHOLDER, value) if value else value


class ChoiceMap(Strict):
    """A value for each choice."""

    values: dict[StrictStr, Value]

    def apply(self, value: str) -> Value:
        """Return the value for a choice."""
        return self.values[value]


def _kind_of_map(value: Any) -> str:
    keys = value if isinstance(value, Mapping) else {}
    return "text" if "text" in keys else "values" if "values" in keys else "number"


AnyMap = Annotated[
    Annotated[NumberMap, Tag("number")] | Annotated[TextMap, Tag("text")] | Annotated[ChoiceMap, Tag("values")],
    Discriminator(_kind_of_map),
]
_MAP_OF_TYPE: Mapping[str, type[Strict]] = {
    "integer": NumberMap,
    "number": NumberMap,
    "string": TextMap,
    "choice": ChoiceMap,
}


class Parameter(Strict):
    """A parameter; one without a default is required.

    Attributes:
        sets: the inputs that get the value.
        map: transforms the value before it is set; None leaves it unchanged.
    """

    type: ParameterType
    description: StrictStr
    default: Value | None = None
    minimum: Number | None = None
    maximum: Number | None = None
    multiple_of: Annotated[StrictInt, Field(gt=0)] | None = None
    choices: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    sets: Annotated[list[Target], Field(min_length=1)]
    map: AnyMap | None = None

    @property
    def is_required(self) -> bool:
        """Whether a request must have it."""
        return self.default is None

    @property
    def is_random(self) -> bool:
        """Whether its default is a random number."""
        return self.type == "integer" and self.default == RANDOM_INT

    @property
    def random_range(self) -> tuple[int, int]:
        """The smallest and the largest of these numbers."""
        smallest = 0 if self.minimum is None else math.ceil(self.minimum)
        largest = _LARGEST_RANDOM if self.maximum is None else min(_LARGEST_RANDOM, math.floor(self.maximum))
        return smallest, largest

    @model_validator(mode="after")
    def _fits_together(self) -> Parameter:
        self._check_limits()
        self._check_choices()
        if self.map is not None and not isinstance(self.map, _MAP_OF_TYPE.get(self.type, ())):
            raise ValueError(f"a map of this kind does not go with type {self.type}")
        self._check_default()
        return self

    def _check_limits(self) -> None:
        if (self.minimum is not None or self.maximum is not None) and self.type not in ("integer", "number"):
            raise ValueError(f"minimum and maximum do not go with type {self.type}")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError("minimum is greater than maximum")
        if self.multiple_of is not None and self.type != "integer":
            raise ValueError(f"multiple_of does not go with type {self.type}")

    def _check_choices(self) -> None:
        if (self.choices is not None) != (self.type == "choice"):
            raise ValueError("choices go with type choice, and it needs them")
        if isinstance(self.map, ChoiceMap) and set(self.map.values) != set(self.choices or ()):
            raise ValueError("map.values must have each of the choices and nothing else")

    def _check_default(self) -> None:
        if self.is_random:
            smallest, largest = self.random_range
            if self.multiple_of is not None or smallest > largest:
                raise ValueError(f"{RANDOM_INT} needs a range from 0 up, and no multiple_of")
        elif self.type == "file" and self.default is not None:
            raise ValueError("a file has no default")
        elif self.default is not None:
            try:
                self.checked(self.default)
            except ValueError as problem:
                raise ValueError(f"the default {problem}") from None

    def checked(self, value: Any) -> Any:
        """Return a valid value; a whole number such as `5.0` becomes an int.

        Raises:
            ValueError: the value is invalid; the message continues the parameter's name ("must be …").
        """
        return _CHECKS[self.type](self, value)

    def mapped(self, value: Any) -> Any:
        """Return the value for the graph from a checked value."""
        return value if self.map is None else self.map.apply(value)


def _text(_parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004 - pydantic turns no TypeError into its own error
    return value


def _flag(_parameter: Parameter, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def _integer(parameter: Parameter, value: Any) -> int:
    whole = _number(parameter, value, "must be a whole number")
    if whole != math.floor(whole):
        raise ValueError("must be a whole number")
    number = int(whole)
    if parameter.multiple_of is not None and number % parameter.multiple_of:
        raise ValueError(f"must be a multiple of {parameter.multiple_of}")
    return number


def _number(parameter: Parameter, value: Any, message: str = "must be a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MAX_NUMBER:
        raise ValueError(message)
    if parameter.minimum is not None and value < parameter.minimum:
        raise ValueError(f"must be at least {parameter.minimum}")
    if parameter.maximum is not None and value > parameter.maximum:
        raise ValueError(f"must be at most {parameter.maximum}")
    return value


def _choice(parameter: Parameter, value: Any) -> str:
    choices = parameter.choices or []
    if value in choices:
        return str(value)
    near = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    advice = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"must be one of {', '.join(map(repr, choices))}{advice}")


def _file(_parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a file: base64, a data URI or a URL")  # noqa: TRY004
    if not is_fetched(value):
        try:
            decode_base64(value, "file")
        except InvalidInput as problem:
            raise ValueError(problem.message.replace("Image 'file' ", "", 1)) from None
    return value


_CHECKS: Mapping[ParameterType, Callable[[Parameter, Any], Any]] = {
    "string": _text,
    "integer": _integer,
    "number": _number,
    "boolean": _flag,
    "choice": _choice,
    "file": _file,
}
