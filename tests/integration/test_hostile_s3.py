"""S3 settings, and buckets of jobs, that must be refused before anything is sent anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.errors import InvalidInput
from comfy_worker.job.payload import parse_job
from comfy_worker.settings import load_settings
from comfy_worker.storage import StorageFactory
from tests.support.leaks import assert_nothing_leaks
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY

CASES = json.loads((Path(__file__).parents[1] / "data/hostile/s3.json").read_text(encoding="utf-8"))
WORKFLOW = {"1": {"class_type": "SaveImage", "inputs": {}}}


def test_there_are_enough_distinct_cases() -> None:
    assert len({case["why"] for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["why"])
def test_hostile_buckets_are_rejected_with_their_error(environment: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    variables = dict(case["settings"])
    if "BUCKET_ENDPOINT_URL" in variables:
        variables = {"BUCKET_ACCESS_KEY_ID": ACCESS_KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET_KEY, **variables}
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(InvalidInput) as refused:
        take_a_job(case.get("job"))
    assert refused.value.message == case["sentence"]
    for text in (refused.value.message, str(refused.value.as_output())):
        assert_nothing_leaks(text)
        assert "hunter22" not in text


def take_a_job(bucket: dict[str, Any] | None) -> None:
    storages = StorageFactory(load_settings())
    job = parse_job({"id": "job", "input": {"workflow": WORKFLOW, **({"s3": bucket} if bucket else {})}})
    storages.choose(job.delivery, None, job.bucket)


OWN = [case for case in CASES if "job" not in case and "BUCKET_ENDPOINT_URL" in case["settings"]]


@pytest.mark.parametrize("case", OWN, ids=lambda case: case["why"])
def test_a_worker_checks_its_bucket_at_startup(environment: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    keys = {"BUCKET_ACCESS_KEY_ID": ACCESS_KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET_KEY}
    for name, value in {**keys, **case["settings"]}.items():
        environment.setenv(name, value)
    with pytest.raises(InvalidInput) as refused:
        StorageFactory(load_settings()).check()
    assert refused.value.message == case["sentence"]
