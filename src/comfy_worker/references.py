"""Where a workflow names the files that it loads: pure functions on a graph.

ComfyUI's loaders take `name`, `folder/name` and either with ` [input]` behind; some inputs are objects or lists of such
names (`LOAD_3D`, and `{"__value__": […]}`, which is how a list is told from a link).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote

from comfy_worker.workflow import Graph, is_link, split_annotation

Path: TypeAlias = tuple[str | int, ...]

_URL = re.compile(r"(https?|s3)://|data:", re.IGNORECASE)
_AROUND_A_NAME = re.compile(r"^[\s.]+|[\s.]+$")
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|\ud800-\udfff]")
_ANNOTATION = re.compile(r"\s*\[(input|output|temp)\]\Z")
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


def refer(graph: Graph, reference: Reference, name: str) -> None:
    """Let a reference name another file, in place; what else the input's value holds is not touched but copied."""
    inputs = graph[reference.node_id]["inputs"]
    _name, annotation = split_annotation(reference.value)
    inputs[reference.input_name] = _replaced(inputs[reference.input_name], reference.path, name + annotation)


def _replaced(value: Any, path: Path, text: str) -> Any:
    if not path:
        return text
    copy: Any = dict(value) if isinstance(value, Mapping) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], text)
    return copy


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
