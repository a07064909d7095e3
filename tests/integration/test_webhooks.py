"""A job's end is sent once, whatever the end and whatever the receiver does, which in turn does nothing to the job."""

from __future__ import annotations

import base64
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from comfy_emulator import EmulatorServer
from comfy_worker.settings import load_settings
from comfy_worker.types import NodeProgress, NodeStarted, Stage, StageStarted
from comfy_worker.webhooks.worker_webhooks import Webhooks
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.gate_node import OBJECT_INFO, Gate, job, registry
from tests.support.network.ports import closed_port
from tests.support.network.webhook_receiver import Receiver
from tests.support.processes.process import start_handler
from tests.support.running_job import RunningJob
from tests.support.runpod.endpoint import endpoint
from tests.support.waiting import TIMEOUT_S

ORANGE = (255, 128, 0)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
QUERY = "query-secret-1"


@pytest.fixture(scope="module")
def comfyui_url() -> Iterator[str]:
    with EmulatorServer(registry=registry(), object_info=OBJECT_INFO) as server:
        yield server.url


def made_for(comfyui_url: str, **settings: Any) -> Worker:
    return Worker(load_settings(comfyui_url=comfyui_url, **{"allow_private_urls": True, **settings}))


@pytest.fixture
def worker(comfyui_url: str, environment: pytest.MonkeyPatch) -> Iterator[Worker]:
    with closing(made_for(comfyui_url, webhook_attempts=2)) as worker:
        yield worker


def hook(receiver: Receiver, **more: Any) -> dict[str, Any]:
    return {"url": receiver.url, **more}


def colors(output: dict[str, Any]) -> Any:
    return [graphs.colors(base64.b64decode(image["data"])) for image in output["images"]]


# -------------------------------------------------------------------------------------------------- whichever end


def test_a_job_that_completed(worker: Worker) -> None:
    with Receiver() as receiver:
        webhook = hook(receiver, secret=SECRET, extra_params={"user": 7, "tags": ["a"]})
        output = worker.run(job(graphs.picture(ORANGE), webhook=webhook))
        worker.close()
        [end] = receiver.received
    end.verify(SECRET)
    assert end.body == {
        "id": "job-1",
        "status": "COMPLETED",
        "executionTime": end.body["executionTime"],
        "output": output,
        "extra_params": {"user": 7, "tags": ["a"]},
    }
    assert end.path == f"/hook?token={QUERY}"
    assert end.headers["content-type"] == "application/json"
    assert colors(end.body["output"]) == [[ORANGE]]


def test_a_job_that_failed(worker: Worker) -> None:
    with Receiver() as receiver:
        output = worker.run(job(graphs.work(0.01, steps=2, fail_at=1), webhook=hook(receiver)))
        worker.close()
        [end] = receiver.received
    assert (end.body["status"], end.body["error"]) == ("FAILED", output["error"])
    assert end.body["output"]["code"] == "out_of_memory"
    assert "webhook-signature" not in end.headers


def test_a_job_that_was_cancelled_while_it_ran(worker: Worker, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Receiver() as receiver:
        running = RunningJob(worker, job(gate.graph(), webhook=hook(receiver)))
        gate.wait_until_run()
        running.stop.set()
        assert running.output()["code"] == "cancelled"
        worker.close()
        [end] = receiver.received
    assert (end.body["status"], end.body["output"]["code"]) == ("CANCELLED", "cancelled")


def test_a_job_cancelled_too_late_has_the_platforms_status(worker: Worker) -> None:
    with Receiver() as receiver:
        webhook = worker._webhooks.for_job(job({}, webhook=hook(receiver)))
        webhook.send_end({"images": []}, cancelled=True)
        worker.close()
        [end] = receiver.received
    assert (end.body["status"], end.body["error"]) == ("CANCELLED", "The job was cancelled")


@pytest.mark.parametrize("limit", [{"timeout_s": 0.3}, {"policy": {"executionTimeout": 300}}])
def test_a_job_that_took_too_long(worker: Worker, tmp_path: Path, limit: dict[str, Any]) -> None:
    with Receiver() as receiver:
        worker.run(job(Gate(tmp_path).graph(), webhook=hook(receiver), **limit))
        worker.close()
        [end] = receiver.received
    assert (end.body["status"], end.body["output"]["code"]) == ("TIMED_OUT", "timed_out")


@pytest.mark.parametrize(
    ("job_input", "code"),
    [
        ({}, "invalid_input"),
        ({"workflow": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}, "missing_nodes"),
        ({"workflow": graphs.picture(ORANGE), "delivery": {"type": "s3"}}, "invalid_input"),
    ],
)
def test_a_job_that_never_started(worker: Worker, job_input: dict[str, Any], code: str) -> None:
    with Receiver() as receiver:
        worker.run({"id": "a", "input": {**job_input, "webhook": hook(receiver, secret=SECRET)}})
        worker.close()
        [end] = receiver.received
    end.verify(SECRET)
    assert (end.body["status"], end.body["output"]["code"]) == ("FAILED", code)


def test_the_settings_give_a_default_receiver(comfyui_url: str, environment: pytest.MonkeyPatch) -> None:
    with (
        Receiver() as own,
        Receiver() as other,
        closing(made_for(comfyui_url, webhook_url=own.url, webhook_secret=SECRET)) as worker,
    ):
        worker.run({**job(graphs.picture(ORANGE)), "id": "a"})
        worker.run({**job(graphs.picture(ORANGE), webhook=hook(other)), "id": "b"})
        refused = worker.run({**job(graphs.picture(ORANGE), webhook=hook(other, secret="whsec_???")), "id": "c"})
        assert worker.run({**job(graphs.picture(ORANGE)), "id": "d"}, send_webhooks=False)["images"]
        worker.close()
        ends = {end.body["id"]: end for end in own.received}
        assert [end.body["id"] for end in other.received] == ["b"]
        assert "webhook-signature" not in other.received[0].headers
    assert ends.keys() == {"a", "c"} and len(own.received) == 2
    for end in ends.values():
        end.verify(SECRET)
    assert refused["error"] == "input.webhook.secret is no secret of Standard Webhooks"


# ---------------------------------------------------------------------------------- whatever the receiver does


def test_a_hanging_receiver_is_not_waited_for(
    comfyui_url: str, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Receiver("hang") as receiver,
        closing(made_for(comfyui_url, webhook_timeout_s=0.3, webhook_attempts=1)) as worker,
    ):
        output = worker.run(job(graphs.picture(ORANGE), webhook=hook(receiver, secret=SECRET)))
        assert colors(output) == [[ORANGE]], "the answer is there although nothing has been released"
        worker.close()
        assert len(receiver.received) == 1 and not receiver.released.is_set()
    assert problems(caplog) == [
        f"the webhook of job job-1 was not accepted by http://127.0.0.1:{receiver.port}: it did not answer within 0.3 s"
    ]


def problems(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says of webhooks, which never has a secret in it, nor a second line."""
    assert QUERY not in caplog.text and SECRET not in caplog.text
    said = [record.getMessage() for record in caplog.records if record.name == "comfy_worker.webhooks"]
    assert not any("\n" in line for line in said)
    return said


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failing_receiver_is_retried_with_the_same_id(
    worker: Worker, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Receiver(status) as receiver:
        output = worker.run(job(graphs.picture(ORANGE), webhook=hook(receiver, secret=SECRET)))
        worker.close()
        first, second = receiver.received
    assert first.id == second.id and first.content == second.content
    assert second.at - first.at > 0.9, "a back-off lies between them"
    for received in (first, second):
        received.verify(SECRET)
    assert colors(output) == [[ORANGE]] and problems(caplog) == []


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_a_rejecting_receiver_is_not_retried(worker: Worker, status: int, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(status) as receiver:
        output = worker.run(job(graphs.picture(ORANGE), webhook=hook(receiver)))
        worker.close()
        assert len(receiver.received) == 1
    assert colors(output) == [[ORANGE]]
    assert problems(caplog) == [
        f"the webhook of job job-1 was not accepted by http://127.0.0.1:{receiver.port}: it answered {status}"
    ]


def test_a_persistently_failing_receiver_is_abandoned(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(500, 500, 500) as receiver:
        assert colors(worker.run(job(graphs.picture(ORANGE), webhook=hook(receiver)))) == [[ORANGE]]
        worker.close()
        assert len(receiver.received) == 2, "WEBHOOK_ATTEMPTS"
    assert [line.rpartition(": ")[2] for line in problems(caplog)] == ["it answered 500"]


def test_a_receiver_that_is_gone(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    with closed_port() as port:
        webhook = {"url": f"http://127.0.0.1:{port}/?token={QUERY}"}
        assert colors(worker.run(job(graphs.picture(ORANGE), webhook=webhook))) == [[ORANGE]]
        worker.close()
    [line] = problems(caplog)
    assert "the connection failed" in line


def test_a_redirect_is_not_followed(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver() as private, Receiver(private.url) as receiver:
        assert colors(worker.run(job(graphs.picture(ORANGE), webhook=hook(receiver)))) == [[ORANGE]]
        worker.close()
        assert (len(receiver.received), len(private.received)) == (1, 0)
    assert [line.rpartition(": ")[2] for line in problems(caplog)] == ["it answered 307"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_private_addresses_get_no_request(
    comfyui_url: str, environment: pytest.MonkeyPatch, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Receiver() as receiver, closing(made_for(comfyui_url, allow_private_urls=False)) as worker:
        url = receiver.url.replace("127.0.0.1", host)
        assert colors(worker.run(job(graphs.picture(ORANGE), webhook={"url": url, "progress": True}))) == [[ORANGE]]
        worker.close()
        assert receiver.received == []
    assert [line.rpartition(": ")[2] for line in problems(caplog)] == ["it leads to an address that is not public"]


def test_the_receiver_does_not_affect_the_response(worker: Worker) -> None:
    def answer(**more: Any) -> dict[str, Any]:
        output = worker.run(job(graphs.picture(ORANGE), **more))
        for image in output["images"]:
            # The picture has the prompt in it, with the folder of its job.
            image["data"] = colors({"images": [image]})
        return {key: value for key, value in output.items() if key not in ("prompt_id", "timings")}

    with Receiver() as well, Receiver(404) as badly:
        answers = [answer(), answer(webhook=hook(well, progress=True)), answer(webhook=hook(badly))]
    assert answers[0] == answers[1] == answers[2]


def test_pending_webhooks_are_limited_and_the_oldest_dropped(environment: pytest.MonkeyPatch) -> None:
    """One of them may not hold up the others, nor all of them fill the memory."""
    settings = load_settings(allow_private_urls=True, webhook_attempts=1)
    with Receiver(*["hang"] * 40) as receiver, closing(Webhooks(settings)) as webhooks:
        for number in range(40):
            webhooks.for_job({"id": f"{number}", "input": {"webhook": hook(receiver)}}).send_end({"images": []})
            if number < 32:
                receiver.wait_for(number + 1)
        receiver.wait_for(40)
        assert sorted(webhooks._pending.values(), key=int) == [str(number) for number in range(8, 40)]
        receiver.released.set()


def test_an_oversized_body_is_marked(environment: pytest.MonkeyPatch) -> None:
    image = {"filename": "a.png", "type": "base64", "data": "A" * 10_000}
    with Receiver() as receiver, closing(Webhooks(load_settings(allow_private_urls=True))) as webhooks:
        webhook = webhooks.for_job({"id": "a", "input": {"webhook": hook(receiver)}}, size_limit=5000)
        webhook.send_end({"images": [image]})
        webhooks.close()
        [end] = receiver.received
    assert end.body["output"] == {"images": [{"filename": "a.png", "type": "base64"}]}
    assert "left out" in end.body["note"]


# ----------------------------------------------------------------------------------------------------- progress


def test_progress_is_sent_in_order_and_rate_limited(environment: pytest.MonkeyPatch) -> None:
    with Receiver() as receiver, closing(Webhooks(load_settings(allow_private_urls=True))) as webhooks:
        spec = hook(receiver, progress=True, secret=SECRET, extra_params={"user": 7})
        webhook = webhooks.for_job(job(graphs.picture(ORANGE), webhook=spec))
        events: list[Any] = []
        on_event = webhook.send_progress(events.append)
        on_event(StageStarted(Stage.RUNNING))
        receiver.wait_for(1)
        on_event(NodeStarted("9", "SaveImage", "Save"))
        for step in range(100):
            on_event(NodeProgress("9", step, 100))
        receiver.wait_for(2)
        assert len(events) == 102, "other listeners receive everything"
        webhook.send_end({"images": []})
        webhooks.close()
        on_event(NodeProgress("9", 100, 100))
        first, second, end = receiver.received
    for received in receiver.received:
        received.verify(SECRET)
        assert received.body["extra_params"] == {"user": 7}
    assert (first.body["type"], first.body["status"], first.body["id"]) == ("progress", "IN_PROGRESS", "job-1")
    assert first.body["output"] == {"stage": "running", "percent": 0.0}
    assert second.body["output"]["step"] == 99, "the latest of what has been, not each"
    assert second.at - first.at > 1.9
    assert end.body["status"] == "COMPLETED" and "type" not in end.body
    assert len({received.id for received in receiver.received}) == 3


def test_progress_is_sent_only_on_request(worker: Worker) -> None:
    with Receiver() as receiver, Receiver() as curious:
        worker.run(job(graphs.work(0.3, steps=5), webhook=hook(receiver)))
        worker.run(job(graphs.work(0.3, steps=5), webhook=hook(curious, progress=True)))
        worker.close()
        assert ["type" in received.body for received in receiver.received] == [False]
        are_progress = ["type" in received.body for received in curious.received]
    assert are_progress == [True] * (len(are_progress) - 1) + [False] and len(are_progress) > 1


@pytest.mark.parametrize("answer", [500, 404, "hang"])
def test_failed_progress_webhooks_do_not_affect_the_end(
    environment: pytest.MonkeyPatch, answer: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_settings(allow_private_urls=True, webhook_timeout_s=0.5)
    with Receiver(answer) as receiver, closing(Webhooks(settings)) as webhooks:
        webhook = webhooks.for_job(job(graphs.picture(ORANGE), webhook=hook(receiver, progress=True)))
        on_event = webhook.send_progress(lambda _event: None)
        on_event(StageStarted(Stage.STAGING))
        receiver.wait_for(1)
        on_event(StageStarted(Stage.QUEUED))
        webhook.send_end({"images": []})
        webhooks.close()
        assert [received.body["status"] for received in receiver.received] == ["IN_PROGRESS", "COMPLETED"]
    assert problems(caplog) == []


# ------------------------------------------------------------------------------------------------ entry points


OPEN = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}


def test_the_runpod_loop_sends_every_end_before_it_exits(comfyui_url: str, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with (
        Receiver() as receiver,
        endpoint(comfyui_url, {**OPEN, "WEBHOOK_URL": receiver.url, "WEBHOOK_SECRET": SECRET}) as running,
    ):
        completed = running.run(workflow=graphs.picture(ORANGE))
        receiver.wait_for(1)
        running.run(workflow=graphs.work(0.01, steps=2, fail_at=1))
        receiver.wait_for(2)
        cancelled = running.platform.submit({"workflow": gate.graph()})
        gate.wait_until_run()
        running.platform.cancel(cancelled)
        receiver.wait_for(3)
        receiver.answers.append(500)
        last = running.platform.submit({"workflow": graphs.picture(ORANGE)})
        receiver.wait_for(4)
        running.worker.send_signal(signal.SIGTERM)
        assert running.worker.wait(TIMEOUT_S) == 0
        ends = receiver.ends
        assert QUERY not in running.worker.output and SECRET not in running.worker.output
    assert [end.body["status"] for end in ends] == ["COMPLETED", "FAILED", "CANCELLED", "COMPLETED", "COMPLETED"]
    assert ends[0].body["output"] == completed["output"]
    assert [end.body["id"] for end in ends[2:]] == [cancelled, last, last]
    assert len({end.id for end in ends}) == 4, "the last one came twice, and says so"
    for end in ends:
        end.verify(SECRET)


def test_a_warm_up_sends_no_webhook(comfyui_url: str) -> None:
    settings = {**OPEN, "WARMUP_WORKFLOW": json.dumps(graphs.picture(ORANGE))}
    with (
        Receiver() as receiver,
        endpoint(comfyui_url, {**settings, "WEBHOOK_URL": receiver.url}) as running,
    ):
        running.run(workflow=graphs.picture(ORANGE))
        [end] = receiver.wait_for(1)
    assert end.body["id"] != "warmup" and "warm-up done" in running.worker.output


def test_a_local_run_sends_its_webhook_before_it_exits(comfyui_url: str, tmp_path: Path) -> None:
    with Receiver(500) as receiver:
        webhook = hook(receiver, secret=SECRET)
        sent = json.dumps({"input": {"workflow": graphs.picture(ORANGE), "webhook": webhook}})
        environment = {**OPEN, "COMFYUI_URL": comfyui_url, "OUTPUT_DIR": str(tmp_path)}
        with start_handler(environment, "--test_input", sent) as process:
            assert process.wait(TIMEOUT_S) == 0
        assert [received.body["status"] for received in receiver.received] == ["COMPLETED", "COMPLETED"]
        assert len({received.id for received in receiver.received}) == 1


def test_an_interrupted_local_run_sends_its_webhook(comfyui_url: str, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Receiver() as receiver:
        sent = json.dumps({"input": {"workflow": gate.graph(), "webhook": hook(receiver)}})
        environment = {**OPEN, "COMFYUI_URL": comfyui_url, "OUTPUT_DIR": str(tmp_path)}
        with start_handler(environment, "--test_input", sent) as process:
            gate.wait_until_run()
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT_S)
        assert [received.body["status"] for received in receiver.received] == ["CANCELLED"]


def test_invalid_settings_are_reported_in_one_sentence(comfyui_url: str) -> None:
    sent = json.dumps({"input": {"workflow": graphs.picture(ORANGE)}})
    settings = {
        "COMFYUI_URL": comfyui_url,
        "WEBHOOK_URL": "https://example.com",
        "WEBHOOK_SECRET": "whsec_no secret at all",
    }
    with start_handler(settings, "--test_input", sent) as process:
        assert process.wait(TIMEOUT_S) == 2
    assert process.stderr.strip() == "WEBHOOK_SECRET is no secret of Standard Webhooks"
    assert "no secret at all" not in process.output


def test_no_thread_runs_without_a_receiver(comfyui_url: str, environment: pytest.MonkeyPatch) -> None:
    with closing(made_for(comfyui_url)) as worker:
        worker.run(job(graphs.picture(ORANGE)))
        assert "webhooks" not in [thread.name for thread in threading.enumerate()]
