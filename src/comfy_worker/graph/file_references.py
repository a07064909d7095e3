"""Finds and replaces the file names and URLs in a workflow. No I/O.

ComfyUI's loaders accept `name`, `folder/name` and both with ` [input]` appended. Some inputs are objects or lists of
such names: `LOAD_3D`, and `{"__value__": […]}`, which distinguishes a list from a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote

from comfy_worker.graph.workflow import Graph, is_link, split_annotation

Path: TypeAlias = tuple[str | int, ...]

MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pt|pt2|pth|bin|pkl|gguf|onnx)$", re.IGNORECASE)
"""The extension of a model file."""
_URL = re.compile(r"(https?|s3)://", re.IGNORECASE)
_AROUND_NAME = re.compile(r"^[\s.]+|[\s.]+$")
_FORBIDDEN_IN_NAME = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|\ud800-\udfff]")
_ANNOTATION = re.compile(r"\s*\[(input|output|temp)\]\Z")
_EXTENSION = re.compile(r"[^\s/]\.(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{1,11}\Z")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_URL_WORDS = frozenset(
    {"link", "links", "href", "webhook", "webhooks", "callback", "endpoint", "host", "server", "address"}
)
_URL_SUFFIXES = ("url", "urls", "uri", "uris")
"""Words in the names of inputs that expect a URL itself, which is then not replaced with a file."""
_MAX_NAME_BYTES = 120
"""For a file name taken from a URL."""
_MAX_EXTENSION_BYTES = 16


@dataclass(frozen=True)
class Reference:
    """A string in a node's input that can name a file.

    Attributes:
        node_id: the id of the node.
        class_type: the class of the node.
        input_name: the input.
        path: the keys and indexes that lead to the string in the input's value; empty if it is the value itself.
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
        """Whether it is a URL to download, not a data URI."""
        return is_fetched(self.value)

    @property
    def is_for_url(self) -> bool:
        """Whether the input expects a URL, according to its name: `url`, `image_url`, `webhookUri`, `link`."""
        names = (self.input_name, *(step for step in self.path if isinstance(step, str)))
        words = (word.lower() for name in names for word in _WORD.findall(name[:_MAX_NAME_BYTES]))
        return any(word in _URL_WORDS or word.endswith(_URL_SUFFIXES) for word in words)

    @property
    def has_extension(self) -> bool:
        """Whether it looks like a file name and not like a word or a number."""
        return _EXTENSION.search(self.name) is not None

    @property
    def is_url(self) -> bool:
        """Whether it is the URL of a file, or a data URI with its content."""
        return self.is_fetched or self.value[:5].lower() == "data:"


def is_fetched(text: str) -> bool:
    """Return whether a text is a URL to download, not a data URI."""
    return _URL.match(text) is not None


def find_strings(graph: Graph) -> Iterator[Reference]:
    """Yield every string in the inputs of a graph, except those in links."""
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
        for index, item in enumerate(value):
            yield from _strings(item, (*path, index))


def replace_references(graph: Graph, names: Iterable[tuple[Reference, str]]) -> None:
    """Write new names into a graph's references. Nested values, which may be shared, are copied first."""
    copied: set[tuple[str, str]] = set()
    for reference, name in names:
        inputs, input_name = graph[reference.node_id]["inputs"], reference.input_name
        text = name + split_annotation(reference.value)[1]
        if not reference.path:
            inputs[input_name] = text
            continue
        if (reference.node_id, input_name) not in copied:
            copied.add((reference.node_id, input_name))
            inputs[input_name] = deepcopy(inputs[input_name])
        holder = inputs[input_name]
        for step in reference.path[:-1]:
            holder = holder[step]
        holder[reference.path[-1]] = text


def name_of_url(url: str) -> str:
    """Return the last part of a URL's path as a file name that is valid on every file system and for ComfyUI."""
    if url[:5].lower() == "data:":
        return "input"
    path = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")[2].partition("/")[2]
    last = unquote(path.rstrip("/").rpartition("/")[2], errors="replace")
    clean = _AROUND_NAME.sub("", _ANNOTATION.sub("", _FORBIDDEN_IN_NAME.sub("_", last)))
    return shorten_name(clean, _MAX_NAME_BYTES) or "input"


def shorten_name(name: str, max_bytes: int) -> str:
    """Return a name with at most `max_bytes` bytes, cut before its extension."""
    if len(name.encode()) <= max_bytes:
        return name
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension.encode()) > _MAX_EXTENSION_BYTES:
        stem, dot, extension = name, "", ""
    stem_bytes = max_bytes - len((dot + extension).encode())
    return stem.encode()[:stem_bytes].decode(errors="ignore") + dot + extension
