"""Loads the file `.env` of the working directory into the environment.

`python -m comfy_worker.env_file` prints the variables as bash commands, for start.sh.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values

from comfy_worker.errors import InvalidInput

_DEFAULT = ".env"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_env_file() -> None:
    """Set the variables of the file that the environment does not have. ENV_FILE names another file; if empty, none.

    Raises:
        InvalidInput: ENV_FILE names a file that does not exist, or the file cannot be read.
    """
    os.environ.update(_new_variables())


def _new_variables() -> Mapping[str, str]:
    name = os.environ.get("ENV_FILE", _DEFAULT if Path(_DEFAULT).is_file() else "")
    if not name:
        return {}
    try:
        values = dotenv_values(stream=io.StringIO(Path(name).read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidInput(f"The file {name} with settings cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"The file {name} with settings is not written in UTF-8") from None
    if "\0" in "".join(f"{variable}{value}" for variable, value in values.items()):
        raise InvalidInput(f"The file {name} with settings has a NUL in it, which no variable can have")
    return {
        variable: value
        for variable, value in values.items()
        if variable and value is not None and variable not in os.environ
    }


if __name__ == "__main__":
    try:
        for name, value in _new_variables().items():
            if _NAME.fullmatch(name):
                print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - this is its output
    except InvalidInput as error:
        sys.exit(error.message)
