"""Buckets that jobs bring: used where they may be, and no way to addresses that are not public."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from comfy_worker.errors import DeliveryFailed
from comfy_worker.types import Delivery, JobBucket
from tests.support.storage.deliveries import (
    CONTENT,
    JOB_ACCESS_KEY,
    JOB_SECRET_KEY,
    LARGE,
    Make,
    deliverable,
    open_base64,
    query_of,
    resolve,
    with_bucket,
)
from tests.support.storage.s3_server import S3Server


def job_bucket(url: str, name: str, **more: Any) -> JobBucket:
    return JobBucket(url, JOB_ACCESS_KEY, JOB_SECRET_KEY, name, **more)


ALLOWED: dict[str, Any] = {"job_bucket_endpoints": "127.0.0.1"}


def test_a_jobs_bucket_takes_precedence_over_the_workers(s3: S3Server, bucket: str, storages: Make) -> None:
    theirs = s3.create_bucket()
    ours = storages(**with_bucket(f"{s3.url}/{bucket}", bucket_acl="public-read", **ALLOWED))
    delivered = ours.choose(Delivery(prefix="mine"), None, job_bucket(s3.url, theirs)).deliver(deliverable("a.png"))

    assert s3.keys(theirs) == ["mine/a.png"]
    assert "mine/a.png" not in s3.keys(bucket)
    assert query_of(delivered)["X-Amz-Credential"].startswith(f"{JOB_ACCESS_KEY}/")
    assert JOB_SECRET_KEY not in unquote(delivered.data)
    grants = s3.client.get_object_acl(Bucket=theirs, Key="mine/a.png")["Grants"]
    assert [grant["Permission"] for grant in grants] == ["FULL_CONTROL"], "what the worker's own bucket is like"


def test_a_job_with_an_input_bucket_can_request_base64(s3: S3Server, bucket: str, storages: Make) -> None:
    ours = storages(**ALLOWED)
    delivered = ours.choose(Delivery(type="base64"), None, job_bucket(s3.url, bucket)).deliver(deliverable("a.png"))
    assert open_base64(delivered).content == CONTENT


def test_more_buckets_than_cached_clients(s3: S3Server, storages: Make) -> None:
    ours = storages(**ALLOWED)
    names = [s3.create_bucket() for _ in range(7)]
    chosen = [ours.choose(Delivery(prefix="p"), None, job_bucket(s3.url, name)) for name in names]
    for storage in chosen:
        storage.deliver(deliverable("small.png"))
        storage.deliver(deliverable("large.png", LARGE))
    assert [s3.keys(name) for name in names] == [["p/large.png", "p/small.png"]] * 7


@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_rebound_host_name_gets_nothing(
    s3: S3Server, storages: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    addresses = {"rebinding.example.com": "93.184.216.34"}
    resolve(monkeypatch, addresses)
    bucket = s3.create_bucket()
    endpoint = f"http://rebinding.example.com:{urlsplit(s3.url).port}"
    storage = storages().choose(Delivery(), None, job_bucket(endpoint, bucket))
    addresses["rebinding.example.com"] = "127.0.0.1"
    with pytest.raises(DeliveryFailed, match=r"S3 could not be reached to store a\.png: EndpointConnectionError"):
        storage.deliver(deliverable("a.png", CONTENT if kind == "small" else LARGE))
    assert s3.keys(bucket) == []


def test_the_environments_proxy_is_not_used_for_public_only_addresses(
    s3: S3Server, bucket: str, storages: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, {"shop.example.com": "93.184.216.34"})
    monkeypatch.setenv("HTTP_PROXY", s3.url)
    storage = storages().choose(Delivery(), None, job_bucket("http://shop.example.com", bucket))
    resolve(monkeypatch, {"shop.example.com": "127.0.0.1"})
    with pytest.raises(DeliveryFailed):
        storage.deliver(deliverable("proxied.png"))
    assert not [key for key in s3.keys(bucket) if "proxied" in key]


@pytest.mark.parametrize(
    ("listed", "endpoint"),
    [
        ("s3.eu-central-1.amazonaws.com", "https://s3.eu-central-1.amazonaws.com"),
        ("s3.eu-central-1.amazonaws.com", "https://shop.s3.eu-central-1.amazonaws.com"),
        ("*.amazonaws.com", "https://shop.s3.eu-central-1.amazonaws.com/"),
        ("a.example.com , S3.Example.com", "https://s3.example.com"),
        ("minio:9000", "http://minio:9000"),
        ("minio", "http://MINIO:9000"),
        ("*", "http://127.0.0.1:9000"),
    ],
)
def test_allowed_hosts_are_accepted(storages: Make, listed: str, endpoint: str) -> None:
    storages(job_bucket_endpoints=listed).choose(Delivery(), None, job_bucket(endpoint, "shop"))


def test_public_addresses_are_accepted_without_a_list(storages: Make) -> None:
    storages().choose(Delivery(), None, job_bucket("https://93.184.216.34", "shop"))
