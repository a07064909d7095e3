"""What stands around a job's workflow: RunPod's `{"id": …, "input": {…}, "policy": …}`, however a client wraps it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.strict_json import InvalidJson, check_json, parse_json

HOW_TO_SEND = 'Send {"input": {"workflow": {…}}}'
_CALLERS_FIELDS = ("input", "webhook", "webhookV2", "policy", "s3Config")
"""What a caller may send beside `id`."""
_PLATFORM_FIELDS = frozenset(
    {
        *("id", "jobId", "requestId", "workerId", "podId", "endpointId", "status", "error", "output", "stream"),
        *("retries", "delayTime", "executionTime", "createdAt", "startedAt", "completedAt", "timestamp", "ttl"),
        "refresh_worker",
    }
)
"""What RunPod's platform may put into a job by itself; nobody is warned of it."""
_POLICY_FIELDS = ("executionTimeout", "ttl", "lowPriority")
_MOST_NAMED = 50
_LONGEST_NAME = 100
_MOST_EXTRA_PARAMS = 64_000
"""Bytes of `webhook.extra_params` as JSON: they come back with each message."""


def read_input(job: Any) -> tuple[Mapping[str, Any], bool]:
    """Return the `input` of a job, and whether it was wrapped twice; a JSON string is taken too.

    `AsyncioEndpoint.run({"input": …})` of RunPod's client wraps it a second time.

    Raises:
        InvalidInput: there is none, or it is no object.
    """
    if not isinstance(job, Mapping):
        raise InvalidInput("The job must be an object with an input", hint=HOW_TO_SEND)
    payload = _object(job.get("input"))
    if "input" not in payload or any(payload.get(name) is not None for name in ("workflow", "template")):
        return payload, False
    return _object(payload["input"]), True


def _object(value: Any) -> Mapping[str, Any]:
    if value is None:
        raise InvalidInput("Please provide input", hint=HOW_TO_SEND)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except InvalidJson as problem:
            raise InvalidInput("Invalid JSON format in input", hint=f"It {problem}") from None
    if not isinstance(value, Mapping):
        raise InvalidInput("input must be an object with a workflow")
    return value


def check_job(job: Any) -> None:
    """Refuse a job with what JSON does not have, or that nests too deeply; whoever parsed it may have let it through.

    Raises:
        InvalidInput: it has NaN, say.
    """
    try:
        check_json(job)
    except InvalidJson as problem:
        raise InvalidInput(f"The job {problem.reason}") from None


def check_extra_params(webhook: Any) -> None:
    """Refuse an `input.webhook` with so many extra parameters that no message should carry them.

    Raises:
        InvalidInput: they have more than 64 kB as JSON.
    """
    extra = webhook.get("extra_params") if isinstance(webhook, Mapping) else None
    if extra and len(json.dumps(extra, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")) > (
        _MOST_EXTRA_PARAMS
    ):
        raise InvalidInput(
            f"input.webhook.extra_params has more than {_MOST_EXTRA_PARAMS // 1000} kB as JSON",
            hint="Send a key instead, by which the receiver finds the rest",
        )


def execution_timeout_s(policy: Any) -> float | None:
    """Return RunPod's `policy.executionTimeout`, milliseconds, in seconds; None where the job carries none."""
    milliseconds = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)) or milliseconds <= 0:
        return None
    return milliseconds / 1000


def warnings_of_job(job: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each field beside `input` that nobody knows, and one if the input is wrapped twice."""
    _payload, is_wrapped = read_input(job)
    if is_wrapped:
        yield "input.input was taken for input: the request wraps its input twice"
    unknown = [name for name in job if name not in _CALLERS_FIELDS and name not in _PLATFORM_FIELDS]
    yield from unknown_names(unknown, _CALLERS_FIELDS, "")
    policy = job.get("policy")
    if isinstance(policy, Mapping):
        yield from unknown_names([name for name in policy if name not in _POLICY_FIELDS], _POLICY_FIELDS, "policy.")


def unknown_names(unknown: list[str], known: tuple[str, ...] | list[str], prefix: str) -> Iterator[str]:
    """Yield a sentence for each of so many unknown names, with the known one that is most like it."""
    for name in unknown[:_MOST_NAMED]:
        cut = str(name) if len(str(name)) <= _LONGEST_NAME else f"{str(name)[:_LONGEST_NAME]}…"
        near = get_close_matches(cut, known, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        yield f"{prefix}{cut} is unknown and was ignored{advice}"
    if len(unknown) > _MOST_NAMED:
        where = prefix.rstrip(".") or "the job"
        yield f"{where} has {len(unknown) - _MOST_NAMED} more keys that are unknown and were ignored"
