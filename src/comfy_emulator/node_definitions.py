"""What each node looks like from outside: its inputs, outputs and lists of values, as `/object_info` tells."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from comfy_emulator.folder_paths import Folders
from comfy_emulator.model_files import FOLDER_OF_INPUT, Models, names_in
from comfy_emulator.node_api import Node, Registry

JsonObject = dict[str, Any]

_3D_SUFFIXES = {".fbx", ".glb", ".gltf", ".obj", ".stl"}
_EXTRA_MEDIA = {"webp": "image", "fbx": "model"}


class InputSpec(NamedTuple):
    """One input of a node: its type (a list of values for old combos), options, and whether it must be given."""

    type: Any
    options: JsonObject
    required: bool

    @property
    def values(self) -> list[Any] | None:
        """The values to choose from; None when the input is no combo."""
        if isinstance(self.type, list):
            return self.type
        if self.type == "COMBO":
            return list(self.options.get("options", ()))
        return None

    def as_json(self) -> list[Any]:
        """Give the pair that error messages quote as `input_config`."""
        return [self.type, self.options]


def load_object_info() -> Mapping[str, JsonObject]:
    """Read the interfaces that come with the package."""
    text = resources.files("comfy_emulator").joinpath("data/object_info.json").read_text(encoding="utf-8")
    object_info: dict[str, JsonObject] = json.loads(text)
    return object_info


class NodeInterfaces:
    """The nodes that can be run, with lists of files and models as they are at this moment."""

    def __init__(
        self, registry: Registry, object_info: Mapping[str, JsonObject], models: Models, folders: Folders
    ) -> None:
        self._nodes = {name: node for name, node in registry.nodes.items() if name in object_info}
        self._object_info = object_info
        self._models = models
        self._folders = folders

    def __contains__(self, class_type: object) -> bool:
        return class_type in self._nodes

    def classes(self) -> list[str]:
        """Name the node classes in the order of `/object_info`."""
        return [name for name in self._object_info if name in self._nodes]

    def node(self, class_type: str) -> Node:
        """Give what the node does."""
        return self._nodes[class_type]

    def is_output(self, class_type: str) -> bool:
        """Tell whether a prompt may end in this node."""
        return bool(self._object_info[class_type]["output_node"])

    def output_types(self, class_type: str) -> tuple[Any, ...]:
        """Name the types of the node's outputs; a combo's type is its list of values."""
        return tuple(self._object_info[class_type]["output"])

    def output_is_list(self, class_type: str) -> tuple[bool, ...]:
        """Tell for each output whether it hands on a list whose items are taken one by one."""
        return tuple(self._object_info[class_type]["output_is_list"])

    def hidden(self, class_type: str) -> Mapping[str, Any]:
        """Name the hidden inputs: `PROMPT`, `UNIQUE_ID`, …, in the newer style within a list, by input name."""
        hidden: Mapping[str, Any] = self._object_info[class_type]["input"].get("hidden", {})
        return hidden

    def inputs(self, class_type: str) -> dict[str, InputSpec]:
        """Give the visible inputs by name, the required ones first."""
        groups = self._object_info[class_type]["input"]
        return {
            name: InputSpec(*self._live(class_type, name, entry), required=group == "required")
            for group in ("required", "optional")
            for name, entry in groups.get(group, {}).items()
        }

    def info(self, class_type: str) -> JsonObject:
        """Answer `/object_info/{class}`."""
        info = self._object_info[class_type]
        groups = {
            group: entries if group == "hidden" else self._live_group(class_type, entries)
            for group, entries in info["input"].items()
        }
        return {"description": "", **info, "input": groups}

    def _live_group(self, class_type: str, entries: Mapping[str, list[Any]]) -> JsonObject:
        return {name: self._live_entry(class_type, name, entry) for name, entry in entries.items()}

    def _live_entry(self, class_type: str, name: str, entry: list[Any]) -> list[Any]:
        """Keep an entry without options as short as it is."""
        kind, options = self._live(class_type, name, entry)
        return [kind, options] if len(entry) > 1 else [kind]

    def _live(self, class_type: str, name: str, entry: list[Any]) -> tuple[Any, JsonObject]:
        """Put the present list of files or models into an input that has one."""
        kind = entry[0]
        options: JsonObject = entry[1] if len(entry) > 1 else {}
        listed = kind if isinstance(kind, list) else options.get("options")
        values = self._present_values(class_type, name, options, listed or [])
        if values is None:
            return kind, options
        if isinstance(kind, list):
            return values, options
        return kind, {**options, "options": values}

    def _present_values(
        self, class_type: str, name: str, options: JsonObject, listed: Collection[str]
    ) -> list[str] | None:
        folder = FOLDER_OF_INPUT.get((class_type, name))
        if folder is not None:
            present = names_in(self._models, self._folders.models, folder)
            return present + [value for value in listed if value not in present]
        if "image_folder" in options:  # the list is fetched from another address, `remote`
            return None
        if (class_type, name) in _FILE_LISTS:
            return _FILE_LISTS[class_type, name](self._folders.input)
        upload = next((kind for kind in _UPLOADS if options.get(kind)), None)
        return _UPLOADS[upload](self._folders.input) if upload else None


def _files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def _media(*kinds: str) -> Callable[[Path], list[str]]:
    """List the files of a folder whose name speaks of one of these kinds of media."""
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
