"""What a node class says of its inputs: which of them name a file, and where that file has to be. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from comfy_worker.graph.file_references import Reference, name_of_url

_UPLOAD_FLAGS = ("image_upload", "audio_upload", "video_upload", "file_upload", "animated_image_upload", "upload")
"""Options by which a node class says that an input names a file of the input folder."""
_FILE_TYPES = ("WEBCAM", "AUDIO_RECORD", "LOAD_3D", "LOAD_3D_ANIMATION")
"""Types of input that hold names of files which ComfyUI's page has uploaded."""
_ANY_FOLDER = {
    ("LoadImage", "image"),
    ("LoadImageMask", "image"),
    ("LoadImageOutput", "image"),
    ("LoadAudio", "audio"),
    ("LoadVideo", "file"),
    ("LoadLatent", "latent"),
}
"""ComfyUI's own inputs that offer a list and take any file of the input folder, in folders too (0.3.64 to 0.8.0)."""
_3D_FOLDER = "3d"
"""The folder that `Load3D` and its kin list, below the input folder."""
_MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pt|pt2|pth|bin|pkl|gguf|onnx)$", re.IGNORECASE)


def names_model(url: str) -> bool:
    """Return whether a URL's name is that of a model: no medium, and far too large to have a look."""
    return _MODEL_FILE.search(name_of_url(url)) is not None


@dataclass(frozen=True)
class InputConfig:
    """What `/object_info` says of one input of a node class.

    Attributes:
        type: its type; None for one that the class does not have.
        is_combo: it offers a list of values.
        is_flagged: the class says that it names a file of the input folder.
        is_multiline: it is a text of several lines.
        takes_any_folder: it offers a list and takes what is not in it, too.
        is_3d: the list is that of the folder `3d`.
        options: what it offered when it was first asked.
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
        """Return what `config`, as `/object_info` has it, says; None stands for an input that is not there."""
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
        """Whether a node loads a file of the input folder by this input.

        A node says so with a flag or the input's type; one that says nothing may still offer the files as a list.
        """
        return self.is_combo or self.is_flagged or self.type in _FILE_TYPES

    @property
    def listed_in(self) -> str | None:
        """The folder whose files it offers and nothing else, None for one that takes any file."""
        if not self.is_combo or self.takes_any_folder:
            return None
        return _3D_FOLDER if self.is_3d else ""

    def loads_name(self, reference: Reference) -> bool:
        """Return whether a string that equals the name of an input file stands for that file.

        In a free text it does only where it reads like the name of a file and the text has one line: a prompt "cat"
        is not the file "cat".
        """
        return self.loads_file or (self.type == "STRING" and not self.is_multiline and reference.has_extension)

    def loads_url(self, reference: Reference) -> bool:
        """Return whether a URL surely is there to be loaded; a combo without a flag may offer models, or URLs even."""
        if self.is_combo and not self.is_flagged and not self.takes_any_folder:
            return reference.value not in self.options and not names_model(reference.value)
        return self.loads_file

    def may_load_url(self, reference: Reference) -> bool:
        """Return whether a URL may be there to be loaded, if it leads to a medium."""
        is_sought = reference.is_fetched and not reference.is_for_url
        return is_sought and not self.is_combo and not names_model(reference.value)
