"""The interface of each node: inputs, outputs and lists of values, as `/object_info` reports them.

The data was recorded from a real ComfyUI (`node_info` of `server.py`). Lists of files and models are filled in here,
as `INPUT_TYPES` of ComfyUI's nodes does.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.json_types import JsonObject
from comfy_emulator.model_files import FOLDER_OF_INPUT, ModelFiles
from comfy_emulator.node_api import Node, NodeRegistry

_3D_SUFFIXES = {".fbx", ".glb", ".gltf", ".obj", ".stl"}
_EXTRA_MEDIA = {"webp": "image", "fbx": "model"}


class InputSpec(NamedTuple):
    """One input of a node; its type is a list of values for combos in the old style."""

    type: Any
    options: JsonObject
    required: bool

    @property
    def values(self) -> list[Any] | None:
        """The values of a combo; None for other inputs."""
        if isinstance(self.type, list):
            return self.type
        if self.type == "COMBO":
            return list(self.options.get("options", ()))
        return None

    def as_json(self) -> list[Any]:
        """Return the pair that validation errors quote as `input_config`."""
        return [self.type, self.options]


def load_object_info() -> Mapping[str, JsonObject]:
    """Read the definitions in this package."""
    text = resources.files("comfy_emulator").joinpath("data/object_info.json").read_text(encoding="utf-8")
    object_info: dict[str, JsonObject] = json.loads(text)
    return object_info


class NodeDefinitions:
    """The nodes that are both registered and defined, with current lists of files and models."""

    def __init__(
        self, registry: NodeRegistry, object_info: Mapping[str, JsonObject], models: ModelFiles, folders: FolderPaths
    ) -> None:
        self._nodes = {name: node for name, node in registry.nodes.items() if name in object_info}
        self._object_info = object_info
        self._models = models
        self._folders = folders

    def __contains__(self, class_type: object) -> bool:
        return class_type in self._nodes

    def class_types(self) -> list[str]:
        """Return the names of the node classes, in the order of `/object_info`."""
        return [name for name in self._object_info if name in self._nodes]

    def node(self, class_type: str) -> Node:
        """Return the node that runs."""
        return self._nodes[class_type]

    def is_output_node(self, class_type: str) -> bool:
        """Return whether the node is an output node (`OUTPUT_NODE`)."""
        return bool(self._object_info[class_type]["output_node"])

    def output_types(self, class_type: str) -> tuple[Any, ...]:
        """Return the types of the outputs (`RETURN_TYPES`); a combo's type is its list of values."""
        return tuple(self._object_info[class_type]["output"])

    def output_is_list(self, class_type: str) -> tuple[bool, ...]:
        """Return for each output whether it is a list whose items the next nodes get one by one (`OUTPUT_IS_LIST`)."""
        return tuple(self._object_info[class_type]["output_is_list"])

    def hidden_inputs(self, class_type: str) -> Mapping[str, Any]:
        """Return the hidden inputs (`PROMPT`, `UNIQUE_ID`, …, in V3 nodes within a list) by input name."""
        hidden: Mapping[str, Any] = self._object_info[class_type]["input"].get("hidden", {})
        return hidden

    def inputs(self, class_type: str) -> dict[str, InputSpec]:
        """Return the visible inputs by name, the required ones first."""
        groups = self._object_info[class_type]["input"]
        return {
            name: InputSpec(*self._with_current_values(class_type, name, entry), required=group == "required")
            for group in ("required", "optional")
            for name, entry in groups.get(group, {}).items()
        }

    def node_info(self, class_type: str) -> JsonObject:
        """Return the entry of `/object_info` (`node_info` of `server.py`)."""
        info = self._object_info[class_type]
        groups = {
            group: entries if group == "hidden" else self._current_group(class_type, entries)
            for group, entries in info["input"].items()
        }
        return {"description": "", **info, "input": groups}

    def _current_group(self, class_type: str, entries: Mapping[str, list[Any]]) -> JsonObject:
        group = {}
        for name, entry in entries.items():
            kind, options = self._with_current_values(class_type, name, entry)
            group[name] = [kind, options] if len(entry) > 1 else [kind]
        return group

    def _with_current_values(self, class_type: str, name: str, entry: list[Any]) -> tuple[Any, JsonObject]:
        """Return type and options of an input, with the current list of files or models if it has one."""
        kind = entry[0]
        options: JsonObject = entry[1] if len(entry) > 1 else {}
        listed = kind if isinstance(kind, list) else options.get("options")
        values = self._current_values(class_type, name, options, listed or [])
        if values is None:
            return kind, options
        if isinstance(kind, list):
            return values, options
        return kind, {**options, "options": values}

    def _current_values(
        self, class_type: str, name: str, options: JsonObject, listed: Collection[str]
    ) -> list[str] | None:
        folder = FOLDER_OF_INPUT.get((class_type, name))
        if folder is not None:
            names = self._models.names(folder)
            return names + [value for value in listed if value not in names]
        if "image_folder" in options:  # the client fetches this list itself, from the address in `remote`
            return None
        if (class_type, name) in _FILE_LISTS:
            return _FILE_LISTS[class_type, name](self._folders.input)
        upload = next((kind for kind in _UPLOADS if options.get(kind)), None)
        return _UPLOADS[upload](self._folders.input) if upload else None


def _files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def _media(*kinds: str) -> Callable[[Path], list[str]]:
    """Return a function that lists files by the media type of their names (`filter_files_content_types`)."""
    return lambda folder: [name for name in _files(folder) if _media_kind(name) in kinds]


def _media_kind(name: str) -> str | None:
    extension = name.rpartition(".")[2]
    if extension in _EXTRA_MEDIA:
        return _EXTRA_MEDIA[extension]
    mime_type = mimetypes.guess_type(name, strict=False)[0]
    return mime_type.partition("/")[0] if mime_type else None


def _3d_files(folder: Path) -> list[str]:
    found = (folder / "3d").rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in found if path.suffix.lower() in _3D_SUFFIXES)


def _latents(folder: Path) -> list[str]:
    return [name for name in _files(folder) if name.endswith(".latent")]


_UPLOADS: Mapping[str, Callable[[Path], list[str]]] = {
    "image_upload": _media("image"),
    "audio_upload": _media("audio", "video"),
    "video_upload": _media("video"),
    "file_upload": _3d_files,
}
_FILE_LISTS: Mapping[tuple[str, str], Callable[[Path], list[str]]] = {
    ("LoadImageMask", "image"): _files,
    ("LoadLatent", "latent"): _latents,
}
