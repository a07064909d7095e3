"""Decides from `/object_info` which inputs of a node class name a file, and in which folder. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_worker.graph.file_references import MODEL_FILE, Reference, name_of_url

_UPLOAD_FLAGS = ("image_upload", "audio_upload", "video_upload", "file_upload", "animated_image_upload", "upload")
"""Options with which a node class marks an input as the name of a file in the input folder."""
_FILE_TYPES = ("WEBCAM", "AUDIO_RECORD", "LOAD_3D", "LOAD_3D_ANIMATION")
"""Input types whose values are names of files that ComfyUI's page has uploaded."""
_ANY_FOLDER = {
    ("LoadImage", "image"),
    ("LoadImageMask", "image"),
    ("LoadImageOutput", "image"),
    ("LoadAudio", "audio"),
    ("LoadVideo", "file"),
    ("LoadLatent", "latent"),
}
"""ComfyUI's own inputs that list the input folder but accept any file in it, also in subfolders (0.3.64 to 0.8.0)."""
_3D_FOLDER = "3d"
"""The subfolder of the input folder that `Load3D` and similar nodes list."""


def names_model(url: str) -> bool:
    """Return whether a URL names a model, which is too large to download as an input."""
    return MODEL_FILE.search(name_of_url(url)) is not None


@dataclass(frozen=True)
class InputConfig:
    """What `/object_info` says about one input of a node class.

    Attributes:
        type: its type; None if the class does not have the input.
        is_combo: it has a list of values.
        is_flagged: an option marks it as the name of a file in the input folder.
        is_multiline: it is a text with several lines.
        takes_any_folder: it accepts files that are not in its list.
        is_3d: its list is the folder `3d`.
        options: its list of values.
    """

    type: Any
    is_combo: bool
    is_flagged: bool
    is_multiline: bool
    takes_any_folder: bool
    is_3d: bool
    options: frozenset[str]

    @classmethod
    def of(cls, class_type: str, input_name: str, config: Any) -> InputConfig:
        """Parse an input's entry in `/object_info`; `config` is None if the class does not have the input."""
        kind = config[0] if config else None
        options = config[1] if config and len(config) > 1 else {}
        listed = frozenset(map(str, kind if isinstance(kind, list) else options.get("options") or []))
        return cls(
            type=kind,
            is_combo=isinstance(kind, list) or kind == "COMBO",
            is_flagged=any(options.get(flag) for flag in _UPLOAD_FLAGS),
            is_multiline=bool(options.get("multiline")),
            takes_any_folder=(class_type, input_name) in _ANY_FOLDER,
            is_3d=class_type.startswith("Load3D") or any(option.startswith(f"{_3D_FOLDER}/") for option in listed),
            options=listed,
        )

    @property
    def loads_file(self) -> bool:
        """Whether the input names a file in the input folder.

        An option or the type says so; a node without either can still list the files.
        """
        return self.is_combo or self.is_flagged or self.type in _FILE_TYPES

    @property
    def listed_in(self) -> str | None:
        """The folder to which the input is restricted by its list; None if it accepts any file."""
        if not self.is_combo or self.takes_any_folder:
            return None
        return _3D_FOLDER if self.is_3d else ""

    def loads_name(self, reference: Reference) -> bool:
        """Return whether a string that equals the name of an input file means that file.

        In a text input it does only if it looks like a file name and the text has one line: a prompt "cat" does not
        mean the file "cat".
        """
        return self.loads_file or (self.type == "STRING" and not self.is_multiline and reference.has_extension)

    def loads_url(self, reference: Reference) -> bool:
        """Return whether a URL must be replaced with its file. Other lists may contain models, or even URLs."""
        if self.is_combo and not self.is_flagged and not self.takes_any_folder:
            return reference.value not in self.options and not names_model(reference.value)
        return self.loads_file

    def may_load_url(self, reference: Reference) -> bool:
        """Return whether a URL is replaced with its file if that turns out to be an image, a video or audio."""
        is_candidate = reference.is_fetched and not reference.is_for_url
        return is_candidate and not self.is_combo and not names_model(reference.value)
