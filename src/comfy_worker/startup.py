"""How a command starts: a refusal becomes a sentence and an exit code, and a signal ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from comfy_worker.errors import WorkerError
from comfy_worker.signals import END_SIGNALS, end_at_once

_NOT_DONE = 2
_EXTRAS = {"celery": "fleet", "kombu": "fleet", "aiohttp": "emulator", "numpy": "emulator", "safetensors": "emulator"}
"""Packages that requirements.txt does not bring, and the extra that does."""


def exit_code_of(work: Callable[[], int]) -> int:
    """Return what `work` does; a refusal is told, and is 2."""
    try:
        return work()
    except ModuleNotFoundError as error:
        say(_what_to_install(error))
    except WorkerError as error:
        say(error.message)
    return _NOT_DONE


def run_until_signal(serve: Callable[[], int]) -> int:
    """Return the exit code of `serve`; END_SIGNALS end the process until `serve` handles them."""
    for number in END_SIGNALS:
        # Until those who have something to end in order put their own in its place.
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
    """Print a sentence for the person who started the command."""
    print(sentence, file=sys.stderr)  # noqa: T201
