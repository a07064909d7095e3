"""Runs a modifier: foreign code that may raise anything, never end, or return something that is no workflow."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import copy
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.gateway.modifiers.loader import LoadedModifier, Modifiers, where_in
from comfy_worker.strict_json import parse_json

log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""How long to wait for a modifier to end after its task was cancelled at the timeout; blocking code never notices."""
_LONGEST_KEY = 100


class _TimedOut(Exception):
    """The modifier took too long."""


@dataclass(frozen=True)
class _Exited:
    """The modifier raised an exception that asyncio treats specially.

    It re-raises the first two out of the event loop; Python 3.10 drops the traceback of the last one.
    """

    error: SystemExit | KeyboardInterrupt | asyncio.CancelledError


@dataclass(frozen=True)
class ModifierResult:
    """The result of a modifier.

    Attributes:
        workflow: a JSON object, not yet checked to be a graph.
        unread: names of the caller's values that the modifier never read.
    """

    workflow: dict[str, Any]
    unread: tuple[str, ...] = ()


def run_modifier(
    modifiers: Modifiers,
    name: str,
    modifications: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 30.0,
) -> ModifierResult:
    """Run the modifier `name` and return its workflow. Blocks, so call it in a worker thread.

    The modifier runs in a thread and an event loop of its own. `modifications` is not changed.

    Raises:
        InvalidInput: there is no such modifier, a value is missing (`MissingValue`), or the modifier refused a value.
        ModifierFailed: its file cannot be loaded, it raised anything else, took longer than `timeout_s` seconds, or
            returned no JSON object.
    """
    found = modifiers.find(name)
    values = copy.deepcopy(dict(modifications or {}))
    outcome = _start(found.name, lambda: _within(timeout_s, _modified(found, values)))
    concurrent.futures.wait([outcome], timeout_s + _GRACE_S)
    error = outcome.exception() if outcome.done() else _TimedOut()
    if error is not None:
        raise _error_for_caller(found, error, timeout_s) from None
    workflow, unread = outcome.result()
    return ModifierResult(_as_json(found.name, workflow), tuple(map(str, unread)))


async def _modified(found: LoadedModifier, modifications: dict[str, Any]) -> Any:
    try:
        modifier = found.modifier(modifications)
        modifier.workflow_folders = found.workflow_folders
        await modifier.load_workflow()
        made = await modifier.get_modified_workflow()
        # A modifier that replaced `modifications` counts as having read all of them.
        return made, list(getattr(getattr(modifier, "modifications", None), "unread", ()))
    except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
        return _Exited(error)


async def _within(limit_s: float, work: Coroutine[Any, Any, Any]) -> Any:
    """Await `work` with a time limit. `asyncio.wait_for` raises a TimeoutError, which could be the modifier's own."""
    task = asyncio.ensure_future(work)
    done, _pending = await asyncio.wait({task}, timeout=limit_s)
    if not done:
        task.cancel()
        raise _TimedOut
    return task.result()


def _start(name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
    """Run `work` in a daemon thread, which cannot keep the process alive, with an event loop of its own."""
    outcome: Future[Any] = Future()

    def drive() -> None:
        try:
            result = asyncio.run(work())
        except BaseException as error:  # noqa: BLE001 - the caller handles whatever a modifier raises
            outcome.set_exception(error)
            return
        if isinstance(result, _Exited):
            outcome.set_exception(result.error)
        else:
            outcome.set_result(result)

    context = contextvars.copy_context()  # so that its log lines name the job
    threading.Thread(target=context.run, args=(drive,), name=f"modifier-{name}", daemon=True).start()
    return outcome


def _error_for_caller(found: LoadedModifier, error: BaseException, timeout_s: float) -> Exception:
    """Return the error for the caller, without a traceback, and log the line of the modifier's file."""
    if isinstance(error, (MissingValue, ModifierFailed)):
        return error
    if isinstance(error, InvalidInput):
        return InvalidInput(_about(found, error.message), details=error.details, hint=error.hint)
    if isinstance(error, _TimedOut):
        log.warning("The modifier %s in %s took longer than %g s", found.name, found.file.name, timeout_s)
        return ModifierFailed(f"Modifier {found.name} took longer than {timeout_s:g} s")
    log.warning("The modifier %s failed: %s of %s", found.name, where_in(found.file, error), found.file.name)
    return ModifierFailed(f"Modifier {found.name} failed with {_kind(error)}")


def _about(found: LoadedModifier, sentence: str) -> str:
    return sentence if found.name in sentence else f"Modifier {found.name}: {sentence}"


def _kind(error: BaseException) -> str:
    """Return the class of an exception and the key of a KeyError; other messages may contain anything."""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    return type(error).__name__ + (f": {key[:_LONGEST_KEY]!r} is missing" if isinstance(key, str) else "")


def _as_json(name: str, workflow: Any) -> dict[str, Any]:
    """Return a copy of the workflow that is JSON and shares nothing with the modifier."""
    if not isinstance(workflow, dict):
        raise ModifierFailed(f"Modifier {name} returned a {type(workflow).__name__} instead of a workflow")
    try:
        made: dict[str, Any] = parse_json(json.dumps(workflow, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ModifierFailed(f"Modifier {name} returned a workflow that is not JSON") from None
    return made
