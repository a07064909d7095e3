"""Which storage a job gets: by its wish, the settings, the room in its answer, and its own bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from comfy_worker.errors import DeliveryFailed, InvalidInput, OutputMissing, OutputTooLarge
from comfy_worker.storage import DeliverableFile, OnDisk
from comfy_worker.types import Delivery
from tests.support.storage.deliveries import (
    CONTENT,
    Make,
    deliverable,
    open_base64,
    open_both,
    open_url,
    query_of,
    with_bucket,
)
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

# --------------------------------------------------------------------------------------------- budgets


def room_for(characters: int) -> int:
    """Return a budget for the base64 of one file, and for what an answer says of it besides."""
    return characters + 512


def test_auto_returns_what_fits_and_uploads_the_rest(s3: S3Server, bucket: str, storages: Make) -> None:
    storage = storages(**with_bucket(f"{s3.url}/{bucket}")).choose(Delivery(type="auto"), inline_budget=4000)
    kinds = [storage.deliver(deliverable("a.bin", bytes(size))).type for size in (900, 9000, 300, 300)]
    assert kinds == ["base64", "s3_url", "base64", "s3_url"]


def test_both_gives_only_the_url_of_an_oversized_file(s3: S3Server, bucket: str, storages: Make) -> None:
    storage = storages(**with_bucket(f"{s3.url}/{bucket}")).choose(Delivery(type="both"), inline_budget=room_for(8))
    fits, too_large = storage.deliver(deliverable("a.bin", b"123456")), storage.deliver(deliverable("b.bin", b"1"))
    assert open_both(fits).content == b"123456"
    assert (too_large.type, too_large.url) == ("s3_url", None)
    assert open_url(too_large).content == b"1"


def test_failed_uploads_take_no_room_in_the_response(s3: S3Server, storages: Make) -> None:
    ours = storages(**with_bucket(f"{s3.url}/late-bucket"))
    storage = ours.choose(Delivery(type="both"), inline_budget=room_for(8))
    with pytest.raises(DeliveryFailed):
        storage.deliver(deliverable("a.bin", b"123456"))
    s3.client.create_bucket(Bucket="late-bucket")
    assert open_both(storage.deliver(deliverable("a.bin", b"123456"))).content == b"123456"


@pytest.mark.parametrize("kind", ["base64", "auto"])
def test_oversized_files_are_rejected_without_a_bucket(storages: Make, kind: Any) -> None:
    storage = storages().choose(Delivery(type=kind), inline_budget=room_for(8))
    assert storage.deliver(deliverable("a.bin", b"123456")).type == "base64"
    with pytest.raises(OutputTooLarge, match="exceed the response limit of 520 characters"):
        storage.deliver(deliverable("b.bin", b"1"))


def test_base64_is_base64_in_spite_of_a_bucket(s3: S3Server, bucket: str, storages: Make) -> None:
    ours = storages(**with_bucket(f"{s3.url}/{bucket}"))
    assert open_base64(ours.choose(Delivery(type="base64")).deliver(deliverable("a.png"))).content == CONTENT


def test_oversized_base64_goes_to_the_bucket(s3: S3Server, bucket: str, storages: Make) -> None:
    ours = storages(**with_bucket(f"{s3.url}/{bucket}"))
    delivered = ours.choose(Delivery(type="base64"), inline_budget=room_for(8)).deliver(deliverable("a.png"))
    assert delivered.type == "s3_url"


def test_unreadable_files_take_no_room_in_the_response(storages: Make, tmp_path: Path) -> None:
    storage = storages().choose(Delivery(), inline_budget=room_for(8))
    with pytest.raises(OutputMissing, match=r"gone\.png could not be read: No such file or directory"):
        storage.deliver(DeliverableFile("job-1", "gone.png", "image/png", OnDisk(tmp_path / "gone.png", 6)))
    assert storage.deliver(deliverable("a.bin", b"123456")).type == "base64"


@pytest.mark.parametrize(
    ("settings", "wish", "delivered"),
    [
        ({}, None, "base64"),
        ({"bucket": True}, None, "s3_url"),
        ({"bucket": True, "delivery": "base64"}, None, "base64"),
        ({"bucket": True, "delivery": "auto"}, None, "base64"),
        ({"bucket": True, "delivery": "base64"}, "s3", "s3_url"),
        ({"delivery": "auto"}, None, "base64"),
    ],
)
def test_the_job_overrides_the_settings(
    s3: S3Server, bucket: str, storages: Make, settings: dict[str, Any], wish: Any, delivered: str
) -> None:
    more = {name: value for name, value in settings.items() if name != "bucket"}
    ours = storages(**(with_bucket(f"{s3.url}/{bucket}") if "bucket" in settings else {}), **more)
    assert ours.choose(Delivery(type=wish)).deliver(deliverable("a.png")).type == delivered


# ------------------------------------------------------------------------------------- names of settings

FAMILIES = {
    "ours": {
        "BUCKET_ENDPOINT_URL": "url",
        "BUCKET_ACCESS_KEY_ID": "key",
        "BUCKET_SECRET_ACCESS_KEY": "secret",
        "BUCKET_NAME": "name",
        "BUCKET_REGION": "region",
    },
    "generate": {
        "S3_ENDPOINT_URL": "url",
        "S3_ACCESS_KEY_ID": "key",
        "S3_SECRET_ACCESS_KEY": "secret",
        "S3_BUCKET_NAME": "name",
        "S3_REGION": "region",
    },
    "task": {
        "STORAGE_TYPE": "s3",
        "S3_ENDPOINT_URL": "url",
        "S3_ACCESS_KEY": "key",
        "S3_SECRET_KEY": "secret",
        "S3_BUCKET_NAME": "name",
        "S3_REGION_NAME": "region",
    },
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_three_families_of_settings_name_one_bucket(
    s3: S3Server, bucket: str, environment: pytest.MonkeyPatch, storages: Make, family: str
) -> None:
    values = {"url": s3.url, "key": ACCESS_KEY, "secret": SECRET_KEY, "name": bucket, "region": "eu-west-3"}
    for name, value in FAMILIES[family].items():
        environment.setenv(name, values.get(value, value))
    delivered = storages().choose(Delivery(prefix=family)).deliver(deliverable("a.png"))
    assert open_url(delivered).content == CONTENT
    assert f"{family}/a.png" in s3.keys(bucket)
    assert "/eu-west-3/s3/" in query_of(delivered)["X-Amz-Credential"]


# ---------------------------------------------------------------------------------------------- preparation


def test_a_prepared_worker_has_its_s3_client(s3: S3Server, bucket: str, storages: Make) -> None:
    ours = storages(**with_bucket(f"{s3.url}/{bucket}"))
    ours.prepare()
    assert open_url(ours.choose(Delivery()).deliver(deliverable("a.png"))).content == CONTENT


def test_a_broken_bucket_is_logged_when_the_worker_starts(storages: Make, caplog: pytest.LogCaptureFixture) -> None:
    ours = storages(**with_bucket("http://minio:9000/a/b"))
    ours.prepare()
    ours.close()
    assert "outputs cannot be delivered to S3: BUCKET_ENDPOINT_URL has more in its path" in caplog.text
    with pytest.raises(InvalidInput, match="BUCKET_ENDPOINT_URL has more in its path"):
        ours.choose(Delivery())
    assert ours.choose(Delivery(type="base64")).deliver(deliverable("a.png")).type == "base64"
