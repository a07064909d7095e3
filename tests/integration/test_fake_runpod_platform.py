"""The stand-in platform itself: what other tests take for granted about it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import CLIENT_KEY
from tests.support.waiting import TIMEOUT_S


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform(take_hold_s=TIMEOUT_S, stop_hold_s=TIMEOUT_S) as running:
        yield running


class Client:
    """The client side, by hand."""

    def __init__(self, platform: Platform) -> None:
        self._base = f"{platform.url}/{platform.endpoint_id}"

    def post(self, path: str, body: Any = None, expect: int = 200) -> dict[str, Any]:
        return self._ask("POST", path, body, expect)

    def get(self, path: str, expect: int = 200) -> dict[str, Any]:
        return self._ask("GET", path, None, expect)

    def _ask(self, method: str, path: str, body: Any, expect: int) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
        response = requests.request(method, f"{self._base}/{path}", json=body, headers=headers, timeout=TIMEOUT_S)
        assert response.status_code == expect, response.text
        answer: dict[str, Any] = response.json()
        return answer


class Worker:
    """The worker side, by hand."""

    def __init__(self, platform: Platform, worker_id: str = "w1") -> None:
        self._base = f"{platform.url}/{platform.endpoint_id}"
        self.id = worker_id

    def take(self) -> requests.Response:
        return requests.get(f"{self._base}/job-take/{self.id}?job_in_progress=0", timeout=TIMEOUT_S)

    def take_batch(self, size: int) -> list[dict[str, Any]]:
        url = f"{self._base}/job-take-batch/{self.id}?x=1&batch_size={size}"
        jobs: list[dict[str, Any]] = requests.get(url, timeout=TIMEOUT_S).json()
        return jobs

    def stops(self) -> dict[str, Any]:
        stops: dict[str, Any] = requests.get(f"{self._base}/job-stop/{self.id}?x=1", timeout=TIMEOUT_S).json()
        return stops

    def post(self, kind: str, job_id: str, body: dict[str, Any]) -> int:
        url = f"{self._base}/{kind}/{self.id}/{job_id}?isStream=false"
        return requests.post(url, json=body, timeout=TIMEOUT_S).status_code


def test_a_job_goes_from_client_to_worker_and_back(platform: Platform) -> None:
    client, worker = Client(platform), Worker(platform)
    queued = client.post("run", {"input": {"a": 1}, "webhook": "http://example.org"})
    assert queued == {"id": queued["id"], "status": "IN_QUEUE"}
    assert worker.take().json() == {"id": queued["id"], "input": {"a": 1}, "webhook": "http://example.org"}
    assert platform.in_flight("w1") == [queued["id"]]
    worker.post("job-done", queued["id"], {"status": "IN_PROGRESS", "output": "half"})
    assert client.get(f"status/{queued['id']}")["output"] == "half"
    worker.post("job-done", queued["id"], {"output": {"b": 2}})

    status = client.get(f"status/{queued['id']}")
    assert (status["status"], status["output"]) == ("COMPLETED", {"b": 2})
    assert status["delayTime"] >= 0
    assert status["executionTime"] >= 0
    assert platform.job(queued["id"]).updates == ["half"]
    assert [(call.kind, call.status) for call in platform.calls(worker_id="w1")] == [
        ("job-take", 200),
        ("job-done", 200),
        ("job-done", 200),
    ]


def test_polls_of_two_workers_are_served_in_turn(platform: Platform) -> None:
    taken: dict[str, str] = {}
    threads = []
    for worker_id in ("w1", "w2"):
        worker = Worker(platform, worker_id)
        threads.append(
            threading.Thread(target=lambda worker=worker: taken.update({worker.id: worker.take().json()["id"]}))
        )
        threads[-1].start()
        platform.wait_for_worker(worker_id)
    jobs = [platform.submit({}), platform.submit({})]
    for thread in threads:
        thread.join(TIMEOUT_S)

    assert taken == {"w1": jobs[0], "w2": jobs[1]}
    assert (platform.in_flight("w1"), platform.in_flight("w2")) == ([jobs[0]], [jobs[1]])


def test_a_batch_respects_its_limit(platform: Platform) -> None:
    jobs = [platform.submit({}) for _ in range(3)]

    assert [job["id"] for job in Worker(platform).take_batch(2)] == jobs[:2]
    assert platform.state.peak_in_flight["w1"] == 2


def test_a_job_is_not_lost_when_its_poll_disconnects(platform: Platform) -> None:
    with requests.Session() as session, pytest.raises(requests.Timeout):
        session.get(f"{platform.url}/ep/job-take/gone?x=1", timeout=0.2)
    platform.wait_until(lambda: platform.state.polling["gone"] == 0, "the end of the poll")
    job_id = platform.submit({})

    assert Worker(platform).take().json()["id"] == job_id


def test_a_cancel_reaches_the_worker_that_has_the_job(platform: Platform) -> None:
    client, worker = Client(platform), Worker(platform)
    job_id = client.post("run", {"input": {}})["id"]
    worker.take()
    assert client.post(f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}

    assert worker.stops() == {"jobsToStop": [job_id]}
    worker.post("job-done", job_id, {"output": "too late"})
    assert platform.status(job_id)["status"] == "CANCELLED"


def test_a_cancelled_or_purged_job_is_never_handed_out(platform: Platform) -> None:
    client = Client(platform)
    cancelled, purged = platform.submit({}), platform.submit({})
    client.post(f"cancel/{cancelled}")
    assert client.post("purge-queue") == {"removed": 1, "status": "completed"}
    following = platform.submit({})

    assert Worker(platform).take().json()["id"] == following
    assert client.get(f"status/{purged}", expect=404) == {"error": "job not found"}


def test_a_job_that_takes_too_long_is_stopped_and_may_be_retried(platform: Platform) -> None:
    client, worker = Client(platform), Worker(platform)
    job_id = platform.submit({}, policy={"executionTimeout": 20})
    worker.take()
    assert platform.wait_for_end(job_id) == "TIMED_OUT"
    assert worker.stops() == {"jobsToStop": [job_id]}

    assert client.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert worker.take().json()["id"] == job_id
    assert client.get("health")["jobs"]["retried"] == 1


def test_runsync_answers_with_the_result_or_after_its_wait(platform: Platform) -> None:
    client, worker = Client(platform), Worker(platform)
    assert client.post("runsync?wait=10", {"input": {}})["status"] == "IN_QUEUE"
    worker.take()
    finisher = threading.Thread(target=lambda: worker.post("job-done", worker.take().json()["id"], {"error": "broken"}))
    finisher.start()
    status = client.post("runsync", {"input": {}})
    finisher.join(TIMEOUT_S)

    assert status["id"].startswith("sync-")
    assert (status["status"], status["error"]) == ("FAILED", "broken")


def test_streamed_chunks_are_given_once_and_become_the_output(platform: Platform) -> None:
    client, worker = Client(platform), Worker(platform)
    job_id = platform.submit({})
    worker.take()
    worker.post("job-stream", job_id, {"output": 1})
    assert client.get(f"stream/{job_id}") == {"status": "IN_PROGRESS", "stream": [{"output": 1}]}
    worker.post("job-stream", job_id, {"output": 2})
    worker.post("job-done", job_id, {"output": []})

    assert client.get(f"stream/{job_id}") == {"status": "COMPLETED", "stream": [{"output": 2}]}
    assert client.get(f"status/{job_id}")["output"] == [1, 2]


def test_it_has_the_flaws_of_the_real_one(platform: Platform) -> None:
    worker = Worker(platform)
    large, late = platform.submit({}), platform.submit({})
    worker.take_batch(2)
    assert worker.post("job-done", large, {"output": "x" * (10 * 2**20)}) == 413
    assert platform.status(large)["status"] == "COMPLETED"
    assert "output" not in platform.status(large)

    worker.post("job-done", late, {"output": "result"})
    worker.post("job-done", late, {"status": "IN_PROGRESS", "output": "late"})
    assert platform.status(late)["status"] == "IN_PROGRESS"


def test_faults_occur_as_often_as_configured(platform: Platform) -> None:
    worker = Worker(platform)
    job_id = platform.submit({})
    platform.inject_fault("job-take", 429, times=1)
    assert worker.take().status_code == 429
    platform.inject_fault("job-take", "cut", times=1)
    with pytest.raises(requests.ConnectionError):
        worker.take()
    assert worker.take().json()["id"] == job_id

    platform.inject_fault("job-done", 500)
    assert [worker.post("job-done", job_id, {"output": 1}) for _ in range(2)] == [500, 500]
    platform.clear_faults()
    assert worker.post("job-done", job_id, {"output": 1}) == 200
    assert [call.status for call in platform.calls()] == [429, None, 200, 500, 500, 200]


def test_it_can_be_down_and_come_back(platform: Platform) -> None:
    job_id = platform.submit({})
    platform.refuse_connections()
    with pytest.raises(requests.ConnectionError, match="refused"):
        Worker(platform).take()
    platform.accept_connections()

    assert Worker(platform).take().json()["id"] == job_id


def test_clients_need_the_key(platform: Platform) -> None:
    assert requests.get(f"{platform.url}/ep/health", timeout=TIMEOUT_S).status_code == 401
