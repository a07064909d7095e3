"""Where nodes find their input files and put their output files: ComfyUI's rules for names and counters."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comfy_emulator.node_api import Context

_ANNOTATIONS = ("input", "output", "temp")
_TEMP_LETTERS = "abcdefghijklmnopqrstupvxyz"


class OutsideFolder(ValueError):
    """A file name leads out of the folder that it is to be found in."""


def annotated_path(input_dir: Path, name: str) -> Path:
    """The file that a node input names: in `input_dir`, unless the name ends in ` [output]` or ` [temp]`.

    The folders of the other two lie beside `input_dir`, as in ComfyUI's base directory. Unlike ComfyUI,
    a name that leads out of its folder is refused.

    Raises:
        OutsideFolder: the name leads out of its folder.
    """
    folder = input_dir
    for annotation in _ANNOTATIONS:
        suffix = f"[{annotation}]"
        if name.endswith(suffix):
            name = name[: -len(suffix) - 1]
            folder = input_dir if annotation == "input" else input_dir.parent / annotation
            break
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OutsideFolder(f"The file name {name!r} leads out of the {folder.name} folder.")
    return path


def annotated_path_exists(input_dir: Path, name: str) -> bool:
    """Whether `annotated_path` names something that is there; False for a name that no file can have."""
    try:
        return annotated_path(input_dir, name).exists()
    except (ValueError, OSError):  # leads out of its folder, holds a NUL, is too long for the file system
        return False


def file_validator(input_name: str, kind: str) -> Callable[..., bool | str]:
    """A `validate` for a node with a file input: refuses a missing file in ComfyUI's words.

    Args:
        input_name: the input that holds the file name.
        kind: what the sentence calls the file: `image`, `audio`, `video`, `latent`.
    """

    def validate(input_dir: Path, **inputs: str) -> bool | str:
        name = inputs[input_name]
        return True if annotated_path_exists(input_dir, name) else f"Invalid {kind} file: {name}"

    return validate


def file_fingerprint(input_name: str) -> Callable[..., str]:
    """A `fingerprint` for a node with a file input: the SHA-256 of the file, in hex."""

    def fingerprint(input_dir: Path, **inputs: str) -> str:
        return hashlib.sha256(annotated_path(input_dir, inputs[input_name]).read_bytes()).hexdigest()

    return fingerprint


@dataclass
class SavePath:
    """Where a node may write its next files.

    Attributes:
        folder: the folder, which exists.
        filename: the start of the file names, without folder.
        counter: number of the next file.
        subfolder: the folder as the client is told it, relative to the root of its type.
        folder_type: `output` or `temp`.
    """

    folder: Path
    filename: str
    counter: int
    subfolder: str
    folder_type: str

    def next_file(self, extension: str, batch_number: int = 0) -> tuple[Path, dict[str, str]]:
        """The next file and what the client is told of it; counts on."""
        name = f"{self.filename.replace('%batch_num%', str(batch_number))}_{self.counter:05}_.{extension}"
        self.counter += 1
        return self.folder / name, {"filename": name, "subfolder": self.subfolder, "type": self.folder_type}


def output_path(context: Context, prefix: str, width: int = 0, height: int = 0) -> SavePath:
    """Where a save node writes files with this `filename_prefix`; see `save_path`."""
    return save_path(context.output_dir, prefix, "output", width, height)


def temp_path(context: Context, width: int = 0, height: int = 0) -> SavePath:
    """Where a preview node writes: `ComfyUI_temp_` and five random letters, in the temp folder."""
    letters = "".join(random.choice(_TEMP_LETTERS) for _ in range(5))
    return save_path(context.temp_dir, f"ComfyUI_temp_{letters}", "temp", width, height)


def save_path(root: Path, prefix: str, folder_type: str, width: int = 0, height: int = 0) -> SavePath:
    """Where files with this prefix go: tokens filled in, folders made, counting on from the highest number there.

    Args:
        root: the output or temp folder.
        prefix: the `filename_prefix`, which may hold folders and the tokens `%year%`, `%month%`, `%day%`, `%hour%`,
            `%minute%`, `%second%`, `%width%` and `%height%`.
        folder_type: `output` or `temp`, as the client is told.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Raises:
        Exception: the prefix leads out of `root`.
    """
    prefix = _fill_tokens(prefix, width, height)
    normal = os.path.normpath(prefix)
    subfolder, filename = os.path.split(normal)
    root = Path(os.path.abspath(root))  # noqa: PTH100 - `Path.resolve` would follow links, which ComfyUI does not
    folder = Path(os.path.abspath(root / subfolder))  # noqa: PTH100
    if not folder.is_relative_to(root):
        raise Exception(_outside_message(root, folder))  # noqa: TRY002 - clients see the type, which is this one
    folder.mkdir(parents=True, exist_ok=True)
    # ComfyUI measures the prefix before it drops a closing slash; numbers are read where that puts them.
    counter = _next_counter(folder, filename, len(prefix.rpartition("/")[2]))
    return SavePath(folder, filename, counter, subfolder, folder_type)


def _fill_tokens(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    values = {
        "width": str(width),
        "height": str(height),
        "year": str(now.tm_year),
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    for token, value in values.items():
        prefix = prefix.replace(f"%{token}%", value)
    return prefix


def _next_counter(folder: Path, filename: str, prefix_length: int) -> int:
    numbers = [
        _number_at(entry.name[prefix_length + 1 :])
        for entry in folder.iterdir()
        if entry.name[: prefix_length + 1] == f"{filename}_"
    ]
    return max(numbers) + 1 if numbers else 1


def _number_at(rest: str) -> int:
    try:
        return int(rest.split("_")[0])
    except ValueError:
        return 0


def _outside_message(root: Path, folder: Path) -> str:
    return (
        "**** ERROR: Saving image outside the output folder is not allowed."
        f"\n full_output_folder: {folder}"
        f"\n         output_dir: {root}"
        f"\n         commonpath: {os.path.commonpath((root, folder))}"
    )


def metadata_texts(context: Context) -> dict[str, str]:
    """What ComfyUI writes into files: the prompt and each entry of `extra_pnginfo`, as JSON texts by key."""
    texts = {"prompt": json.dumps(dict(context.prompt))}
    for key, value in (context.extra_pnginfo or {}).items():
        texts[key] = json.dumps(value)
    return texts
