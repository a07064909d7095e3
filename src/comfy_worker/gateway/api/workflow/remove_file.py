"""Removes a file whose name comes from a caller."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path, PurePosixPath


def remove_file(root: Path, name: str) -> None:
    """Remove a file below a folder, without following links.

    Raises:
        OSError: the file does not exist or cannot be removed.
        ValueError: the name leads out of the folder, or through or to a link.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise ValueError("the name leads out of the folder")
    with contextlib.ExitStack() as stack:
        parent = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, parent)
        for part in parts[:-1]:
            if not stat.S_ISDIR(os.stat(part, dir_fd=parent, follow_symlinks=False).st_mode):
                raise ValueError("it lies below a link")
            parent = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            stack.callback(os.close, parent)
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=parent, follow_symlinks=False).st_mode):
            raise ValueError("it is a link or no file")
        os.unlink(parts[-1], dir_fd=parent)
