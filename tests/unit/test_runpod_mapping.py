"""A job in RunPod's words, its end in the gateway's, and who may submit it."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import DeliveryFailed
from comfy_worker.gateway.engines.runpod.claims import Claims, is_claim
from comfy_worker.gateway.engines.runpod.client import Pause
from comfy_worker.gateway.engines.runpod.mapping import outcome_of, progress_in, store_files, submission
from comfy_worker.gateway.engines.runpod.remote_job import RemoteJob
from comfy_worker.gateway.errors import RequestTooLarge, Unauthorized
from comfy_worker.gateway.jobs.signed_links import CallbackLinks
from comfy_worker.gateway.store.records import LOW_PRIORITY, JobRecord
from comfy_worker.storage.local import LocalStorage
from comfy_worker.types import JobState

SECRET = "a-secret-of-the-gateway"


def record(**values: Any) -> JobRecord:
    return JobRecord(**{"id": "a-u1", "endpoint_id": "x", "state": JobState.IN_QUEUE, "created_at": 0.0, **values})


# ---------------------------------------------------------------------------------------------- submission


@pytest.mark.parametrize("as_text", [False, True])
def test_requests_have_input_policy_and_bucket_but_not_the_callers_webhook(as_text: bool) -> None:
    job_input: Any = {"workflow": {}, "webhook": {"url": "http://caller/"}, "timeout_s": 5}
    request = {
        "input": json.dumps(job_input) if as_text else job_input,
        "webhook": "http://caller/",
        "s3Config": {"accessId": "a"},
        "other": 1,
    }
    sent = json.loads(submission(record(priority=LOW_PRIORITY), request, "https://gateway/runpod/webhook/a-u1"))

    assert sent == {
        "input": {"workflow": {}, "timeout_s": 5},
        "policy": {"executionTimeout": 600_000, "ttl": 87_000_000, "lowPriority": True},
        "s3Config": {"accessId": "a"},
        "webhook": "https://gateway/runpod/webhook/a-u1",
    }


@given(run_s=st.floats(0.001, 604_800), wait_s=st.floats(0.001, 604_800))
def test_times_are_within_runpods_limits(run_s: float, wait_s: float) -> None:
    job = record(execution_timeout_s=run_s, queue_ttl_s=wait_s)
    policy = json.loads(submission(job, {"input": {}}, None))["policy"]

    assert 5_000 <= policy["executionTimeout"] <= 604_800_000
    assert 10_000 <= policy["ttl"] <= 604_800_000


def test_jobs_beyond_runpods_limits_are_not_sent() -> None:
    with pytest.raises(RequestTooLarge, match="10 MB"):
        submission(record(), {"input": {"workflow": "x" * 10_000_000}}, None)


# ----------------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize(
    ("status", "state", "error"),
    [
        ({"status": "COMPLETED", "output": {"images": []}, "executionTime": 1500}, "COMPLETED", None),
        (
            {"status": "FAILED", "error": "No.", "output": {"code": "missing_nodes", "hint": "h", "details": [1]}},
            "FAILED",
            {"error": "No.", "code": "missing_nodes", "hint": "h", "details": [1]},
        ),
        (
            {"status": "FAILED", "error": "Too long", "output": {"code": "timed_out"}},
            "TIMED_OUT",
            {"error": "Too long", "code": "timed_out"},
        ),
        ({"status": "FAILED", "error": "x", "output": {"code": "cancelled"}}, "CANCELLED", None),
        ({"status": "CANCELLED"}, "CANCELLED", None),
        ({"status": "FAILED"}, "FAILED", "RunPod says that the job failed, and not why"),
        ({"status": "TIMED_OUT"}, "TIMED_OUT", "RunPod ended the job because it took longer than its policy allows"),
        ({"status": "COMPLETED"}, "FAILED", "RunPod calls the job completed, and has no output of it"),
        (
            {"status": "COMPLETED", "output": "text"},
            "FAILED",
            "RunPod calls the job completed, and has no output of it",
        ),
        (
            {
                "status": "FAILED",
                "error": json.dumps({"error_type": "x", "error_message": "Oh", "error_traceback": "t"}),
            },
            "FAILED",
            {"error": "Oh", "code": "execution_failed"},
        ),
        ({"status": "FAILED", "error": f"key {SECRET}"}, "FAILED", "key ***"),
    ],
)
def test_every_runpod_outcome_is_mapped(status: dict[str, Any], state: str, error: Any) -> None:
    outcome = outcome_of(status, [SECRET])

    assert outcome.state.value == state
    if isinstance(error, str):
        assert outcome.error is not None
        assert outcome.error["code"]
        if SECRET in str(status):
            assert SECRET not in outcome.error["error"]
        else:
            assert outcome.error["error"] == error
    else:
        assert outcome.error == error


def test_a_failed_job_keeps_its_partial_outputs() -> None:
    made = {"images": [{"filename": "a.png"}], "partial": True}
    error = {"code": "execution_failed", "details": {"node_id": "3"}}
    status = {"status": "FAILED", "error": "Oh", "output": {"error": "Oh", **error, **made}}
    outcome = outcome_of(status, [SECRET])
    assert (outcome.state.value, outcome.output, outcome.error) == ("FAILED", made, {"error": "Oh", **error})


def test_only_running_jobs_have_progress() -> None:
    output = {"stage": "running", "percent": 5}
    assert progress_in({"status": "IN_PROGRESS", "output": output}) == output
    assert progress_in({"status": "IN_PROGRESS", "output": "text"}) is None
    assert progress_in({"status": "COMPLETED", "output": output}) is None


def test_files_are_stored_separately_and_links_kept(tmp_path: Path) -> None:
    def item(data: str, **other: Any) -> dict[str, Any]:
        return {"filename": "../a.png", "type": "base64", "data": base64.b64encode(data.encode()).decode(), **other}

    link = {"filename": "b.png", "type": "s3_url", "data": "https://bucket/b.png"}
    output = {"images": [item("one"), item("two"), link], "videos": [item("")], "texts": [{"text": "t"}]}
    kept = store_files("a-u1", output, LocalStorage(tmp_path, "asset:"))

    paths = [tmp_path / found["data"].removeprefix("asset:/") for found in (*kept["images"][:2], *kept["videos"])]
    assert [path.read_text() for path in paths] == ["one", "two", ""]
    assert all(path.resolve().is_relative_to(tmp_path) for path in paths)
    assert [found["size_bytes"] for found in kept["images"]] == [3, 3, 0]
    assert kept["images"][2]["data"] == link["data"]
    assert kept["texts"] == output["texts"]
    with pytest.raises(DeliveryFailed):
        store_files("a-u1", {"images": [{**item("x"), "data": "@@"}]}, LocalStorage(tmp_path, "asset:"))


# ------------------------------------------------------------------------------------------- claims, times


def test_a_claim_expires_at_once_with_its_process(tmp_path: Path) -> None:
    maker, other = Claims(tmp_path, 60.0), Claims(tmp_path, 60.0)
    maker.acquire()
    other.acquire()
    claim = maker.new()

    assert is_claim(claim)
    assert len(claim) <= 64
    assert not is_claim("5e1f-u1")
    assert not is_claim(None)
    assert 50 < other.remaining_s(claim) <= 60
    maker.release()
    # As a kill leaves it: the file is there, and nobody holds it.
    (tmp_path / f"{claim.split(':')[2]}.lock").touch()
    assert other.remaining_s(claim) == 0
    assert other.remaining_s(claim) == 0
    other.release()


def test_another_machines_claim_expires_after_its_lifetime(tmp_path: Path) -> None:
    claims = Claims(tmp_path, 60.0)

    assert claims.remaining_s(f"sending:{time.time() - 61:.3f}:elsewhere:1") == 0
    assert 0 < claims.remaining_s(f"sending:{time.time() + 3600:.3f}:elsewhere:1") <= 60


def test_failures_in_one_round_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pause, lengths = Pause(), []
    for _ in range(9):
        pause.lengthen()
        pause.lengthen()
        lengths.append(pause.seconds)
        now += pause.seconds
    assert lengths == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    pause.end()
    assert pause.seconds == 0
    pause.lengthen(retry_after_s=5)
    assert pause.seconds == 5


def test_a_job_is_polled_with_backoff() -> None:
    job = RemoteJob.of(record(), is_own=True)
    pauses = [job.next_pause_s(is_called_back=False) for _ in range(12)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.25, 2.0)
    assert max(job.next_pause_s(is_called_back=True) for _ in range(12)) == 15.0
    job.changed()
    assert job.next_pause_s(is_called_back=True) == 0.25
    assert RemoteJob.of(record(), is_own=False).next_pause_s(is_called_back=False) == 5.0


def test_a_job_that_runpod_never_ends_is_ended_here() -> None:
    waiting = RemoteJob.of(record(created_at=time.time() - 100, queue_ttl_s=90), is_own=True)
    assert waiting.overdue(is_answered=True) is not None
    assert waiting.overdue(is_answered=False) is None, "it may have run while RunPod could not be asked"
    running = record(state=JobState.IN_PROGRESS, started_at=time.time() - 730, execution_timeout_s=600)
    overdue = RemoteJob.of(running, is_own=True).overdue(is_answered=True)
    assert overdue == "The job ran for longer than 600 seconds, and RunPod did not end it"


def test_a_webhook_url_is_valid_only_for_its_job() -> None:
    links = CallbackLinks("secret", "https://gateway.example.com")
    url = links.url("a-u1")
    assert url is not None
    signature = url.partition("signature=")[2]
    links.check("a-u1", signature)
    for job_id, other in (("b-u1", signature), ("a-u1", ""), ("a-u1", signature[:-1])):
        with pytest.raises(Unauthorized):
            links.check(job_id, other)
    assert CallbackLinks("secret", "").url("a-u1") is None
