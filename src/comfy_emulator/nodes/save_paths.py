"""Names and metadata of the files that save nodes write (`get_save_image_path` of ComfyUI's `folder_paths.py`)."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from comfy_emulator.node_api import NodeContext

_TEMP_LETTERS = "abcdefghijklmnopqrstupvxyz"
"""The letters of `PreviewImage` in ComfyUI's `nodes.py`, with its typing error."""


@dataclass
class SavePath:
    """Where a node writes its next files.

    Attributes:
        folder: the existing folder.
        filename: the start of the file names.
        counter: the number of the next file.
        subfolder: the folder relative to that of its type.
        folder_type: `output` or `temp`.
    """

    folder: Path
    filename: str
    counter: int
    subfolder: str
    folder_type: str

    def next_file(self, extension: str, batch_number: int = 0) -> tuple[Path, dict[str, str]]:
        """Return the next file and its entry in the node's `ui`."""
        name = f"{self.filename.replace('%batch_num%', str(batch_number))}_{self.counter:05}_.{extension}"
        self.counter += 1
        return self.folder / name, {"filename": name, "subfolder": self.subfolder, "type": self.folder_type}


def output_path(context: NodeContext, prefix: str, width: int = 0, height: int = 0) -> SavePath:
    """Return where a save node writes files with a `filename_prefix`; see `save_path`."""
    return save_path(context.folders.output, prefix, "output", width, height)


def temp_path(context: NodeContext) -> SavePath:
    """Return where a preview node writes: `ComfyUI_temp_` and five random letters, in the temp folder."""
    letters = "".join(random.choice(_TEMP_LETTERS) for _ in range(5))
    return save_path(context.folders.temp, f"ComfyUI_temp_{letters}", "temp")


def save_path(root: Path, prefix: str, folder_type: str, width: int = 0, height: int = 0) -> SavePath:
    """Return where files with a prefix go; the counter continues after the highest number there.

    Args:
        root: the output or temp folder.
        prefix: the `filename_prefix`, which may contain folders and the tokens `%year%`, `%month%`, `%day%`, `%hour%`,
            `%minute%`, `%second%`, `%width%` and `%height%`.
        folder_type: `output` or `temp`.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Raises:
        Exception: the prefix leads out of `root`.
    """
    prefix = _fill_tokens(prefix, width, height)
    normal = os.path.normpath(prefix)
    subfolder, filename = os.path.split(normal)
    root = Path(os.path.abspath(root))  # noqa: PTH100 - `Path.resolve` follows links, ComfyUI does not
    folder = Path(os.path.abspath(root / subfolder))  # noqa: PTH100
    if not folder.is_relative_to(root):
        raise Exception(_outside_message(root, folder))  # noqa: TRY002 - clients see the type, which is this in ComfyUI
    folder.mkdir(parents=True, exist_ok=True)
    # As in ComfyUI: the length of the prefix before its trailing slash is removed says where numbers start.
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


def metadata_texts(context: NodeContext) -> dict[str, str]:
    """Return the metadata of files: the prompt and each entry of `extra_pnginfo` as JSON, by key."""
    texts = {"prompt": json.dumps(dict(context.prompt))}
    for key, value in (context.extra_pnginfo or {}).items():
        texts[key] = json.dumps(value)
    return texts
