"""Runs a modifier: foreign code, which may raise anything, never end, or make something that is no workflow."""

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
from comfy_worker.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.modifiers.loader import FoundModifier, Modifiers, where_in
from comfy_worker.strict_json import parse_json

log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""How much longer than its time a modifier is waited for that was told to end; one that blocks does not hear it."""
_LONGEST_KEY = 100


class _TookTooLong(Exception):
    """The modifier's time is over."""


@dataclass(frozen=True)
class _Exited:
    """The modifier raised what asyncio treats as its own.

    It throws the first two at whoever runs the loop; of the last one Python 3.10 loses where it was raised.
    """

    error: SystemExit | KeyboardInterrupt | asyncio.CancelledError


@dataclass(frozen=True)
class Made:
    """What a modifier made.

    Attributes:
        workflow: JSON, not checked to be a graph.
        unread: names of the caller's values that the modifier never looked at.
    """

    workflow: dict[str, Any]
    unread: tuple[str, ...] = ()


def apply(
    modifiers: Modifiers,
    name: str,
    modifications: Mapping[str, Any] | None = None,
    workflow_json: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 30.0,
) -> Made:
    """Return what the modifier `name` makes; blocks, so it is to be called in a worker thread.

    The modifier runs in a thread and an event loop of its own. `workflow_json` is for modifiers without a
    `WORKFLOW_JSON`, others ignore it. Neither it nor `modifications` is changed.

    Raises:
        InvalidInput: there is no such modifier, a value is missing (`MissingValue`), or the modifier refused a value.
        ModifierFailed: its file cannot be loaded, it raised anything else, took longer than `timeout_s` seconds, or
            made no JSON object.
    """
    found = modifiers.find(name)
    values = copy.deepcopy(dict(modifications or {}))
    outcome = _start(found.name, lambda: _within(timeout_s, _modified(found, values, workflow_json)))
    concurrent.futures.wait([outcome], timeout_s + _GRACE_S)
    error = outcome.exception() if outcome.done() else _TookTooLong()
    if error is not None:
        raise _as_ours(found, error, timeout_s) from None
    workflow, unread = outcome.result()
    return Made(_as_json(found.name, workflow), tuple(map(str, unread)))


async def _modified(found: FoundModifier, modifications: dict[str, Any], workflow: Mapping[str, Any] | None) -> Any:
    try:
        modifier = found.modifier(modifications)
        modifier.workflow_folders = found.workflow_folders
        await modifier.load_workflow(workflow)
        made = await modifier.get_modified_workflow()
        # One that has put other values in the place of the caller's has read them all.
        return made, list(getattr(getattr(modifier, "modifications", None), "unread", ()))
    except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
        return _Exited(error)


async def _within(limit_s: float, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what `work` returns; not `asyncio.wait_for`, whose TimeoutError may as well be the modifier's own."""
    task = asyncio.ensure_future(work)
    done, _pending = await asyncio.wait({task}, timeout=limit_s)
    if not done:
        task.cancel()
        raise _TookTooLong
    return task.result()


def _start(name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
    """Run `work` in a thread and loop of its own; a thread that blocks for ever does not hold up the process's end."""
    outcome: Future[Any] = Future()

    def drive() -> None:
        try:
            result = asyncio.run(work())
        except BaseException as error:  # noqa: BLE001 - whatever a modifier raises is looked at by who waits for it
            outcome.set_exception(error)
            return
        if isinstance(result, _Exited):
            outcome.set_exception(result.error)
        else:
            outcome.set_result(result)

    context = contextvars.copy_context()  # so that its log lines name the job
    threading.Thread(target=context.run, args=(drive,), name=f"modifier-{name}", daemon=True).start()
    return outcome


def _as_ours(found: FoundModifier, error: BaseException, timeout_s: float) -> Exception:
    """Return what the caller is told; the log gets the line of the modifier's file, nobody gets a traceback."""
    if isinstance(error, (MissingValue, ModifierFailed)):
        return error
    if isinstance(error, InvalidInput):
        return InvalidInput(_about(found, error.message), details=error.details, hint=error.hint)
    if isinstance(error, _TookTooLong):
        log.warning("The modifier %s of %s took longer than %g s", found.name, found.file.name, timeout_s)
        return ModifierFailed(f"Modifier {found.name} took longer than {timeout_s:g} s")
    log.warning("The modifier %s failed: %s of %s", found.name, where_in(found.file, error), found.file.name)
    return ModifierFailed(f"Modifier {found.name} failed with {_kind(error)}")


def _about(found: FoundModifier, sentence: str) -> str:
    return sentence if found.name in sentence else f"Modifier {found.name}: {sentence}"


def _kind(error: BaseException) -> str:
    """Return the class of an exception, and the key that a KeyError is about; other words may say anything."""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    return type(error).__name__ + (f": {key[:_LONGEST_KEY]!r} is missing" if isinstance(key, str) else "")


def _as_json(name: str, workflow: Any) -> dict[str, Any]:
    """Return the workflow as it will be sent: only JSON, and nothing in it shared with the modifier."""
    if not isinstance(workflow, dict):
        raise ModifierFailed(f"Modifier {name} made no workflow but a {type(workflow).__name__}")
    try:
        made: dict[str, Any] = parse_json(json.dumps(workflow, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ModifierFailed(f"Modifier {name} made a workflow that is not JSON") from None
    return made
