"""Where a workflow names the files that it loads: pure functions on a graph.

ComfyUI's loaders take `name`, `folder/name` and either with ` [input]` behind; some inputs are objects or lists of such
names (`LOAD_3D`, and `{"__value__": […]}`, which is how a list is told from a link).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote

from comfy_worker.graph.workflow import Graph, is_link, split_annotation

Path: TypeAlias = tuple[str | int, ...]

_URL = re.compile(r"(https?|s3)://|data:", re.IGNORECASE)
_AROUND_A_NAME = re.compile(r"^[\s.]+|[\s.]+$")
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|\ud800-\udfff]")
_ANNOTATION = re.compile(r"\s*\[(input|output|temp)\]\Z")
_EXTENSION = re.compile(r"[^\s/]\.(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{1,11}\Z")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_URL_WORDS = frozenset(
    {"link", "links", "href", "webhook", "webhooks", "callback", "endpoint", "host", "server", "address"}
)
_URL_ENDS = ("url", "urls", "uri", "uris")
"""What the names of inputs have that are for a URL itself: it is not replaced by what is there."""
_LONGEST_NAME = 120
"""Bytes of a name that is made out of a URL."""
_LONGEST_EXTENSION = 16


@dataclass(frozen=True)
class Reference:
    """A string in a node's input that may name a file.

    Attributes:
        node_id: the node, with its `class_type`.
        input_name: the input.
        path: where in the input's value it stands; empty for an input that is the string itself.
        value: the string.
    """

    node_id: str
    class_type: str
    input_name: str
    path: Path
    value: str

    @property
    def name(self) -> str:
        """The file's name, without ` [input]`."""
        return split_annotation(self.value)[0]

    @property
    def is_fetched(self) -> bool:
        """Whether it is a URL of something that is elsewhere; no data URI."""
        return self.is_url and self.value[:5].lower() != "data:"

    @property
    def is_for_url(self) -> bool:
        """Whether the input is there for a URL, by a word of its name: `url`, `image_url`, `webhookUri`, `link`."""
        names = (self.input_name, *(step for step in self.path if isinstance(step, str)))
        words = (word.lower() for name in names for word in _WORD.findall(name[:_LONGEST_NAME]))
        return any(word in _URL_WORDS or word.endswith(_URL_ENDS) for word in words)

    @property
    def has_extension(self) -> bool:
        """Whether it reads like the name of a file, not like a word or a number."""
        return _EXTENSION.search(self.name) is not None

    @property
    def is_url(self) -> bool:
        """Whether it says where the file is to be fetched, or is the file itself."""
        return _URL.match(self.value) is not None


def find_strings(graph: Graph) -> Iterator[Reference]:
    """Yield every string in the inputs of a graph; a link between two nodes is none."""
    for node_id, node in graph.items():
        for input_name, value in node["inputs"].items():
            for path, text in _strings(value, ()):
                yield Reference(node_id, node["class_type"], input_name, path, text)


def _strings(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, (*path, key))
    elif isinstance(value, list) and not is_link(value):
        for place, item in enumerate(value):
            yield from _strings(item, (*path, place))


def refer(graph: Graph, names: Iterable[tuple[Reference, str]]) -> None:
    """Let references name other files, in place; what else the inputs' values hold is not touched but copied, once."""
    own: set[tuple[str, str]] = set()
    for reference, name in names:
        inputs, input_name = graph[reference.node_id]["inputs"], reference.input_name
        text = name + split_annotation(reference.value)[1]
        if not reference.path:
            inputs[input_name] = text
            continue
        if (reference.node_id, input_name) not in own:
            own.add((reference.node_id, input_name))
            inputs[input_name] = _copied(inputs[input_name])
        holder = inputs[input_name]
        for step in reference.path[:-1]:
            holder = holder[step]
        holder[reference.path[-1]] = text


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def name_of_url(url: str) -> str:
    """Return a file name out of the last part of a URL's path; one that any file system and ComfyUI take."""
    if url[:5].lower() == "data:":
        return "input"
    path = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")[2].partition("/")[2]
    last = unquote(path.rstrip("/").rpartition("/")[2], errors="replace")
    clean = _AROUND_A_NAME.sub("", _ANNOTATION.sub("", _NOT_IN_A_NAME.sub("_", last)))
    return shortened(clean, _LONGEST_NAME) or "input"


def shortened(name: str, longest: int) -> str:
    """Return a name of at most so many bytes, cut before its extension."""
    if len(name.encode()) <= longest:
        return name
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension.encode()) > _LONGEST_EXTENSION:
        stem, dot, extension = name, "", ""
    room = longest - len((dot + extension).encode())
    return stem.encode()[:room].decode(errors="ignore") + dot + extension
