"""What webhooks say and to whom, without anyone who listens."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from comfy_worker.errors import Cancelled, DiskFull, InvalidInput, TimedOut, all_errors
from comfy_worker.gateway.api.runpod.schemas import WEBHOOK
from comfy_worker.gateway.jobs.webhook_receivers import check_receiver
from comfy_worker.settings import load_settings
from comfy_worker.types import JobState, Webhook
from comfy_worker.webhooks.message import Message, check_webhook, encode, end_of, status_of
from comfy_worker.webhooks.sending import socket_to_public
from comfy_worker.webhooks.worker_webhooks import Webhooks

URL = "https://example.com/hook"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
)


# ------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize(
    "url", [URL, "http://example.com", "HTTPS://user:pw@example.com:8443/a?b=c", "http://[::1]:80/"]
)
@pytest.mark.parametrize(
    "secret", [None, SECRET, SECRET.removeprefix("whsec_"), "whsec_YQ", "whsec_YQ==", "plain text", "whsk_ö", "\ud800"]
)
def test_a_valid_webhook_is_accepted(url: str, secret: str | None) -> None:
    check_webhook(Webhook(url, secret))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com",
        "file:///etc/passwd",
        "http://",
        "http://:80",
        "http://exa mple.com",
        "http://example.com\\@127.0.0.1",
        "http://0x7f.1/",
        "http://2130706433/",
        "http://127.1/",
        "http://example.com:99999/",
        "https://example.com/\r\nHost: a",
    ],
)
def test_an_ambiguous_url_is_rejected(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"^input\.webhook\.url "):
        check_webhook(Webhook(url))


@pytest.mark.parametrize("secret", ["whsec_", "whsec_not base64", "whsec_ö", "whsec_==="])
def test_a_malformed_whsec_secret_is_rejected_without_being_shown(secret: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_webhook(Webhook(URL, secret))
    assert refused.value.message == "input.webhook.secret is no secret of Standard Webhooks"


def test_an_empty_secret_is_rejected() -> None:
    with pytest.raises(InvalidInput, match=r"^input\.webhook\.secret is empty$"):
        check_webhook(Webhook(URL, ""))


def test_an_overridden_webhook_is_checked_too() -> None:
    with pytest.raises(InvalidInput, match="webhookV2 must be a URL of http or https"):
        check_receiver({"input": {}, "webhook": URL, "webhookV2": "ftp://example.com"})


@given(st.from_regex(WEBHOOK, fullmatch=True).filter(str.strip))
def test_every_declared_url_is_accepted(url: str) -> None:
    check_webhook(Webhook(url.removesuffix("\n")))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"webhook_url": "ftp://a"}, "WEBHOOK_URL"),
        ({"webhook_url": URL, "webhook_secret": "whsec_no secret"}, "WEBHOOK_SECRET"),
    ],
)
def test_invalid_settings_stop_the_worker_at_startup(settings: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name} "):
        Webhooks(load_settings(**settings))


# -------------------------------------------------------------------------------------------------- the receiver


OWN = Webhook("https://own.example/", SECRET)
WORKFLOW = {"1": {"class_type": "SaveImage", "inputs": {}}}


@pytest.mark.parametrize(
    ("job_input", "expected"),
    [
        ({"workflow": WORKFLOW}, OWN),
        ({"workflow": WORKFLOW, "webhook": {"url": URL}}, Webhook(URL)),
        ({"workflow": WORKFLOW, "webhook": None}, OWN),
        (json.dumps({"webhook": {"url": URL, "secret": SECRET}}), Webhook(URL, SECRET)),
        # Nothing else of the input needs to be sound.
        ({"webhook": {"url": URL, "extra_params": {"a": 1}, "progress": True}}, Webhook(URL, None, {"a": 1}, True)),
        ({"webhook": {"url": "ftp://a"}}, OWN),
        ({"webhook": {"url": URL, "secret": "whsec_no secret"}}, OWN),
        ({"webhook": "https://a"}, OWN),
        ({"webhook": {"url": 3}}, OWN),
        ("no JSON", OWN),
        (None, OWN),
    ],
)
def test_the_jobs_own_receiver_comes_first(job_input: Any, expected: Webhook) -> None:
    webhooks = Webhooks(load_settings(webhook_url=OWN.url, webhook_secret=SECRET))
    assert webhooks._receiver({"id": "a", "input": job_input}) == expected


def test_a_jobs_receiver_never_gets_the_workers_signature() -> None:
    webhooks = Webhooks(load_settings(webhook_url=OWN.url, webhook_secret=SECRET))
    receiver = webhooks._receiver({"input": {"webhook": {"url": OWN.url}}})
    assert receiver is not None and receiver.secret is None


# ---------------------------------------------------------------------------------------------- what it says


def test_the_state_follows_from_the_error() -> None:
    states = {Cancelled: JobState.CANCELLED, TimedOut: JobState.TIMED_OUT}
    for error in all_errors():
        output = {"error": "It went wrong", "code": error.code}
        assert status_of(output) is states.get(error, JobState.FAILED)
    assert status_of({"images": []}) is JobState.COMPLETED


def test_the_body_has_the_shape_of_runpods_status() -> None:
    output: dict[str, Any] = {"images": [], "timings": {}}
    assert end_of("a", output, 1.2345) == {"id": "a", "status": "COMPLETED", "executionTime": 1234, "output": output}
    assert end_of("a", DiskFull("No room", hint="Buy some").as_output(), 0.5) == {
        "id": "a",
        "status": "FAILED",
        "executionTime": 500,
        "error": "No room",
        "output": {"error": "No room", "code": "disk_full", "hint": "Buy some"},
    }


@given(extra=st.dictionaries(st.text(), JSON, min_size=1, max_size=4))
def test_extra_params_come_back_as_json(extra: dict[str, Any]) -> None:
    message = Message.of(Webhook(URL, SECRET, extra), "a", {"id": "a", "status": "COMPLETED"})
    body = json.loads(message.body, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert body.keys() == {"id", "status", "extra_params"}
    assert body["extra_params"].keys() == extra.keys()
    message.body.encode("ascii")


@given(job_id=st.text(), body=st.text())
def test_messages_of_any_job_id_can_be_verified(job_id: str, body: str) -> None:
    message = Message.of(Webhook(URL, SECRET), f"{job_id}_COMPLETED", {"id": job_id, "output": body})
    headers = message.headers()
    assert Verifier(SECRET).verify(message.body, headers) == {"id": job_id, "output": body}
    assert headers["webhook-id"].isascii() and headers["webhook-id"].isprintable()
    with pytest.raises(WebhookVerificationError):
        Verifier("whsec_YW5vdGhlcg==").verify(message.body, headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(f"{message.body} ", headers)


def test_without_a_secret_there_is_no_signature() -> None:
    assert Message.of(Webhook(URL), "a", {}).headers().keys() == {
        "Content-Type",
        "User-Agent",
        "webhook-id",
        "webhook-timestamp",
    }


def picture(data: str, kind: str = "base64") -> dict[str, Any]:
    return {"filename": "a.png", "type": kind, "data": data, "size_bytes": 3}


def test_an_oversized_body_omits_the_output_data() -> None:
    output = {"images": [picture("A" * 5000), picture("https://s3/a", "s3_url")], "audio": [picture("B" * 5000)]}
    body = json.loads(encode({"id": "a", "output": output}, 2000))
    assert body["output"]["images"] == [
        {"filename": "a.png", "type": "base64", "size_bytes": 3},
        picture("https://s3/a", "s3_url"),
    ]
    assert "data" not in body["output"]["audio"][0]
    assert body["note"].endswith(" bytes, and the limit is 2000: the data of its outputs was left out")
    assert json.loads(encode({"id": "a", "output": output}, None)) == {"id": "a", "output": output}


@given(size=st.integers(0, 3000), text=st.integers(0, 3000), limit=st.integers(200, 3000))
def test_bodies_never_exceed_the_limit(size: int, text: int, limit: int) -> None:
    output = {"images": [picture("A" * size)], "texts": [{"text": "B" * text}]}
    body = {"id": "a", "status": "COMPLETED", "executionTime": 1, "output": output}
    encoded = encode(body, limit)
    assert len(encoded) <= limit
    assert (json.loads(encoded) == body) is (len(json.dumps(body)) <= limit)


# ------------------------------------------------------------------------------------------------- to whom


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1"])
def test_a_rebound_host_name_is_not_connected(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(OSError, match="not public"):
        socket_to_public((family, socket.SOCK_STREAM, 0, "", (address, 80)))


def test_a_public_address_is_connected() -> None:
    with socket_to_public((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("93.184.215.14", 443))) as made:
        assert made.family == socket.AF_INET


def test_a_plain_secret_signs_as_ai_docks_wrapper_does() -> None:
    """The check is the one that the wrapper's README shows."""
    message = Message.of(Webhook(URL, "shared-secret"), "a", {"id": "a", "status": "completed", "message": "ö"})
    signature = message.headers()["X-Webhook-Signature"]
    expected = hmac.new(b"shared-secret", message.body.encode(), hashlib.sha256).hexdigest()
    assert signature == f"sha256={expected}"
    assert "webhook-signature" not in message.headers()


def test_unprefixed_base64_signs_both_ways_and_prefixed_base64_one() -> None:
    plain, prefixed = (Message.of(Webhook(URL, secret), "a", {}).headers() for secret in (SECRET[6:], SECRET))
    assert Verifier(SECRET).verify("{}", plain) == {}
    assert plain["X-Webhook-Signature"].startswith("sha256=")
    assert Verifier(SECRET).verify("{}", prefixed) == {}
    assert "X-Webhook-Signature" not in prefixed
