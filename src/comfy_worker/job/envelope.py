"""The object around a job's input: RunPod's `{"id": …, "input": {…}, "policy": …}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.strict_json import InvalidJson, check_json, parse_json

_INPUT_HINT = 'Send {"input": {"workflow": {…}}}'
LOCAL_JOB_ID = "local_test"
"""The id of a job without one, as in RunPod's SDK."""
_CALLER_FIELDS = ("input", "webhook", "webhookV2", "policy", "s3Config")
"""What a caller may send."""
_PLATFORM_FIELDS = frozenset(
    {
        *("id", "jobId", "requestId", "workerId", "podId", "endpointId", "status", "error", "output", "stream"),
        *("retries", "delayTime", "executionTime", "createdAt", "startedAt", "completedAt", "timestamp", "ttl"),
        "refresh_worker",
    }
)
"""What RunPod itself may add; there is no warning about these."""
_POLICY_FIELDS = ("executionTimeout", "ttl", "lowPriority")
_MAX_NAMED = 50
_MAX_NAME_LENGTH = 100


def check_is_object(job: Any) -> None:
    """Refuse a job that is not a JSON object.

    Raises:
        InvalidInput: the job was refused.
    """
    if not isinstance(job, Mapping):
        raise InvalidInput("The job must be an object with an input", hint=_INPUT_HINT)


def job_id_of(job: Mapping[str, Any]) -> str:
    """Return the id of a job."""
    return str(job.get("id") or LOCAL_JOB_ID)


def read_input(job: Any) -> tuple[Mapping[str, Any], bool]:
    """Return the `input` of a job, and whether it was wrapped twice; it may be a JSON string.

    `AsyncioEndpoint.run({"input": …})` of RunPod's client wraps it a second time.

    Raises:
        InvalidInput: it is missing, or is no object.
    """
    check_is_object(job)
    payload = _object(job.get("input"))
    if "input" not in payload or any(payload.get(name) is not None for name in ("workflow", "template")):
        return payload, False
    return _object(payload["input"]), True


def _object(value: Any) -> Mapping[str, Any]:
    if value is None:
        raise InvalidInput("Please provide input", hint=_INPUT_HINT)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except InvalidJson as problem:
            raise InvalidInput("Invalid JSON format in input", hint=f"It {problem}") from None
    if not isinstance(value, Mapping):
        raise InvalidInput("input must be an object with a workflow")
    return value


def check_job(job: Any) -> None:
    """Refuse a job that JSON cannot represent or that nests too deeply: other parsers accept NaN, for example.

    Raises:
        InvalidInput: the job was refused.
    """
    try:
        check_json(job)
    except InvalidJson as problem:
        raise InvalidInput(f"The job {problem.reason}") from None


def execution_timeout_s(policy: Any) -> float | None:
    """Return RunPod's `policy.executionTimeout`, milliseconds, in seconds; None without one."""
    milliseconds = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)) or milliseconds <= 0:
        return None
    return milliseconds / 1000


def warnings_of_job(job: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each unknown field beside `input`, and one if the input is wrapped twice."""
    _payload, is_wrapped = read_input(job)
    if is_wrapped:
        yield "input.input was taken for input: the request wraps its input twice"
    unknown = [name for name in job if name not in _CALLER_FIELDS and name not in _PLATFORM_FIELDS]
    yield from unknown_names(unknown, _CALLER_FIELDS, "")
    policy = job.get("policy")
    if isinstance(policy, Mapping):
        yield from unknown_names([name for name in policy if name not in _POLICY_FIELDS], _POLICY_FIELDS, "policy.")


def unknown_names(unknown: Sequence[str], known: Sequence[str], prefix: str) -> Iterator[str]:
    """Yield a sentence for each unknown name, with the known name that is most like it; after 50, their number."""
    for name in unknown[:_MAX_NAMED]:
        cut = str(name) if len(str(name)) <= _MAX_NAME_LENGTH else f"{str(name)[:_MAX_NAME_LENGTH]}…"
        near = get_close_matches(cut, known, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        yield f"{prefix}{cut} is unknown and was ignored{advice}"
    if len(unknown) > _MAX_NAMED:
        where = prefix.rstrip(".") or "the job"
        yield f"{where} has {len(unknown) - _MAX_NAMED} more keys that are unknown and were ignored"
