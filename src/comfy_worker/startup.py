"""The start of a command: errors become a sentence and an exit code, and signals end the process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from comfy_worker.errors import WorkerError
from comfy_worker.signals import END_SIGNALS, end_at_once

_FAILED = 2
_EXTRAS = {"celery": "fleet", "kombu": "fleet", "aiohttp": "emulator", "numpy": "emulator", "safetensors": "emulator"}
"""Packages that are not in requirements.txt, and the extras that install them."""


def exit_code_of(work: Callable[[], int]) -> int:
    """Return the exit code of `work`; print an error and return 2 if it raises one."""
    try:
        return work()
    except ModuleNotFoundError as error:
        say(_what_to_install(error))
    except WorkerError as error:
        say(error.message)
    return _FAILED


def run_until_signal(serve: Callable[[], int]) -> int:
    """Return the exit code of `serve`; END_SIGNALS end the process until `serve` sets handlers of its own."""
    for number in END_SIGNALS:
        signal.signal(number, end_at_once)
    return exit_code_of(serve)


def _what_to_install(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("", "comfy_worker"):
        raise error
    source = f"'.[{_EXTRAS[package]}]'" if package in _EXTRAS else "-r requirements.txt"
    return (
        f"The package {package} is not installed, which comfy-worker needs for this: run "
        f"`pip install {source}` in the folder of its pyproject.toml."
    )


def say(sentence: str) -> None:
    """Print a sentence to standard error."""
    print(sentence, file=sys.stderr)  # noqa: T201
