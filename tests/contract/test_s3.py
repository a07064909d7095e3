"""What S3 promises besides: where objects lie, what they are like, what is sent, and what goes wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import Cancelled, DeliveryFailed, InvalidInput
from comfy_worker.serverless.sdk import import_runpod
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import DeliverableFile, InMemory, OnDisk, Watched, buckets
from comfy_worker.storage.object_keys import safe_path
from comfy_worker.types import Delivery, JobBucket
from tests.support.leaks import assert_nothing_leaks
from tests.support.network.ports import closed_port
from tests.support.storage.deliveries import (
    CONTENT,
    JOB_ACCESS_KEY,
    JOB_SECRET_KEY,
    LARGE,
    GeneratedContent,
    Make,
    RecordingS3,
    deliverable,
    query_of,
    resolve,
    with_bucket,
)
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.waiting import TIMEOUT_S


def test_an_object_is_stored_under_its_job_and_downloads_under_its_name(
    s3: S3Server, bucket: str, storages: Make
) -> None:
    storage = storages(**with_bucket(f"{s3.url}/{bucket}")).choose(Delivery())
    delivered = storage.deliver(deliverable("größe/my picture.png", job_id="job-7"))

    assert unquote(urlsplit(delivered.data).path) == f"/{bucket}/job-7/größe/my picture.png"
    assert s3.read(bucket, "job-7/größe/my picture.png").content_type == "image/png"
    disposition = requests.get(delivered.data, timeout=TIMEOUT_S).headers["Content-Disposition"]
    assert disposition == "inline; filename*=UTF-8''my%20picture.png"


@pytest.mark.parametrize(
    ("name", "mime_type", "how"),
    [
        ("a.png", "image/png", "inline"),
        ("a.mp4", "video/mp4", "inline"),
        ("a.flac", "audio/flac", "inline"),
        ("a.txt", "text/plain", "inline"),
        ("a.svg", "image/svg+xml", "attachment"),
        ("a.html", "text/html", "attachment"),
        ("a.bin", "application/octet-stream", "attachment"),
    ],
)
def test_browsers_display_only_harmless_types(
    s3: S3Server, bucket: str, storages: Make, name: str, mime_type: str, how: str
) -> None:
    storage = storages(**with_bucket(f"{s3.url}/{bucket}")).choose(Delivery())
    delivered = storage.deliver(DeliverableFile("job-1", name, mime_type, InMemory(b"")))
    response = requests.get(delivered.data, timeout=TIMEOUT_S)
    assert response.headers["Content-Disposition"].startswith(f"{how}; ")
    assert response.headers["Content-Type"].startswith(mime_type)


def test_a_job_may_choose_folder_and_expiry(s3: S3Server, bucket: str, storages: Make) -> None:
    ours = storages(**with_bucket(f"{s3.url}/{bucket}", bucket_url_expires_s=1234))
    chosen = ours.choose(Delivery(type="s3", prefix="customers/7", expires_s=60)).deliver(deliverable("a.png"))
    default = ours.choose(Delivery()).deliver(deliverable("a.png"))

    assert urlsplit(chosen.data).path == f"/{bucket}/customers/7/a.png"
    assert query_of(chosen)["X-Amz-Expires"] == "60"
    assert urlsplit(default.data).path == f"/{bucket}/job-1/a.png"
    assert query_of(default)["X-Amz-Expires"] == "1234"


def test_a_url_does_not_carry_the_secret_key(s3: S3Server, bucket: str, storages: Make) -> None:
    delivered = storages(**with_bucket(f"{s3.url}/{bucket}")).choose(Delivery()).deliver(deliverable("a.png"))

    assert SECRET_KEY not in unquote(delivered.data)


@pytest.mark.parametrize(("region", "signed"), [(None, "us-east-1"), ("eu-central-1", "eu-central-1")])
def test_the_signature_has_the_region(
    s3: S3Server, bucket: str, storages: Make, region: str | None, signed: str
) -> None:
    storage = storages(**with_bucket(f"{s3.url}/{bucket}", bucket_region=region)).choose(Delivery())
    credential = query_of(storage.deliver(deliverable("a.png")))["X-Amz-Credential"]
    assert credential.split("/")[0] == ACCESS_KEY
    assert credential.split("/")[2:] == [signed, "s3", "aws4_request"]


def test_a_bucket_in_the_host_stays_there(
    s3: S3Server, bucket: str, storages: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = f"{bucket}.s3.us-east-1.amazonaws.com"
    resolve(monkeypatch, {host: "127.0.0.1"})
    url = f"http://s3.us-east-1.amazonaws.com:{urlsplit(s3.url).port}"
    delivered = storages(**with_bucket(url, bucket_name=bucket)).choose(Delivery()).deliver(deliverable("a.png"))

    assert urlsplit(delivered.data).hostname == host
    assert urlsplit(delivered.data).path == "/job-1/a.png"


def test_a_public_bucket_gives_plain_urls(s3: S3Server, bucket: str, storages: Make) -> None:
    settings = with_bucket(f"{s3.url}/{bucket}", bucket_public_url="https://cdn.example.com/outputs/")
    delivered = storages(**settings).choose(Delivery()).deliver(deliverable("sub/my picture é.png"))

    assert delivered.data == "https://cdn.example.com/outputs/job-1/sub/my%20picture%20%C3%A9.png"
    assert s3.read(bucket, "job-1/sub/my picture é.png").content == CONTENT


def test_large_files_are_multipart_and_cancelled_ones_leave_no_parts(s3: S3Server, bucket: str, storages: Make) -> None:
    storage = storages(**with_bucket(f"{s3.url}/{bucket}")).choose(Delivery(prefix="parts"))
    storage.deliver(deliverable("large.bin", LARGE))
    assert s3.client.head_object(Bucket=bucket, Key="parts/large.bin")["ETag"].strip('"').endswith("-3")

    stop = Stop()
    content = Watched(GeneratedContent(len(LARGE), before_last=stop.set), stop.check)
    with pytest.raises(Cancelled):
        storage.deliver(DeliverableFile("job-1", "cancelled.bin", "application/octet-stream", content))
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket)
    assert "parts/cancelled.bin" not in s3.keys(bucket)


# -------------------------------------------------------------------------------------------- what is sent


def test_an_image_is_one_request(recorder: RecordingS3, storages: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(CONTENT)
    storage = storages(**with_bucket(f"{recorder.url}/bucket")).choose(Delivery())
    storage.deliver(DeliverableFile("job-1", "a.png", "image/png", OnDisk(path, len(CONTENT))))

    [(method, url, headers)] = recorder.requests
    assert (method, url) == ("PUT", "/bucket/job-1/a.png")
    assert int(headers["content-length"]) == len(CONTENT)
    assert not {"expect", "content-md5", "transfer-encoding", "content-encoding"} & headers.keys()
    assert not [name for name in headers if "checksum" in name or "trailer" in name]


def test_a_path_of_the_endpoint_itself_is_kept(recorder: RecordingS3, storages: Make) -> None:
    settings = with_bucket(f"{recorder.url}/storage/v1/s3", bucket_name="shop")
    delivered = storages(**settings).choose(Delivery()).deliver(deliverable("a.png"))

    assert [path for _method, path, _headers in recorder.requests] == ["/storage/v1/s3/shop/job-1/a.png"]
    assert urlsplit(delivered.data).path == "/storage/v1/s3/shop/job-1/a.png"


# ---------------------------------------------------------------------------------------------------- keys


def key_of(template: str, deliverable: DeliverableFile, recorder: RecordingS3, storages: Make, **delivery: Any) -> str:
    settings = with_bucket(f"{recorder.url}/bucket", bucket_key_template=template)
    storages(**settings).choose(Delivery(**delivery)).deliver(deliverable)
    return unquote(recorder.requests[-1][1]).removeprefix("/bucket/")


@pytest.mark.parametrize(
    ("template", "delivery", "key"),
    [
        ("{job_id}/{filename}", {}, "job-1/sub/a.png"),
        ("{job_id}/{filename}", {"prefix": "shop/7"}, "shop/7/sub/a.png"),
        ("comfy/{prefix}/{job_id}/{filename}", {"prefix": "shop/7"}, "comfy/shop/7/job-1/sub/a.png"),
        ("comfy/{prefix}/{filename}", {}, "comfy/job-1/sub/a.png"),
        ("{job_id}-{node_id}-{index}.png", {}, "job-1-12-3-4.png"),
        ("{{outputs}}/{job_id}/{filename}", {}, "{outputs}/job-1/sub/a.png"),
    ],
)
def test_keys_follow_the_template(
    recorder: RecordingS3, storages: Make, template: str, delivery: dict[str, Any], key: str
) -> None:
    output = deliverable("sub/a.png", node_id="12:3", index=4)
    assert key_of(template, output, recorder, storages, **delivery) == key


def test_a_key_can_contain_the_date(recorder: RecordingS3, storages: Make) -> None:
    key = key_of("{date}/{job_id}/{filename}", deliverable("a.png"), recorder, storages)
    assert len(key.split("/")[0].split("-")) == 3


@pytest.mark.parametrize(
    ("job_id", "folder"),
    [
        ("../../etc", "..-..-etc"),
        ("..", "-"),
        ("a/b", "a-b"),
        ("größe 1", "gr--e-1"),
        ("sync-1234-u1", "sync-1234-u1"),
    ],
)
def test_job_ids_cannot_escape_the_folder(recorder: RecordingS3, storages: Make, job_id: str, folder: str) -> None:
    assert key_of("{job_id}/{filename}", deliverable("a.png", job_id=job_id), recorder, storages) == f"{folder}/a.png"


def test_an_overlong_key_is_one_sentence(recorder: RecordingS3, storages: Make) -> None:
    with pytest.raises(DeliveryFailed, match=r"The key of x{40}… would be longer than 1024 bytes"):
        key_of("{job_id}/{filename}", deliverable("x" * 1100), recorder, storages)


@given(st.text(max_size=40))
def test_every_name_becomes_a_contained_path(name: str) -> None:
    path = safe_path(name)
    assert path.encode()
    assert all(part not in ("", ".", "..") for part in path.split("/"))
    assert safe_path(path) == path


# ---------------------------------------------------------------------------------------------------- failure


def test_a_missing_bucket_is_named_without_a_secret(s3: S3Server, storages: Make) -> None:
    storage = storages(**with_bucket(f"{s3.url}/no-such-bucket")).choose(Delivery())
    for content in (CONTENT, LARGE):
        with pytest.raises(DeliveryFailed) as failure:
            storage.deliver(deliverable("a.png", content))

        assert failure.value.message == "S3 refused a.png for bucket 'no-such-bucket': NoSuchBucket"
        assert_secrets_are_kept(failure.value)


def test_an_unreachable_host_is_an_error_without_a_secret(storages: Make) -> None:
    with closed_port() as port:
        storage = storages(**with_bucket(f"http://127.0.0.1:{port}/bucket")).choose(Delivery())
        with pytest.raises(DeliveryFailed) as failure:
            storage.deliver(deliverable("a.png"))

    assert failure.value.message == "S3 could not be reached to store a.png: EndpointConnectionError"
    assert_secrets_are_kept(failure.value)


def assert_secrets_are_kept(failure: DeliveryFailed) -> None:
    for text in (failure.message, str(failure.as_output())):
        assert_nothing_leaks(text)
        assert ACCESS_KEY not in text


GIVEN = with_bucket("http://127.0.0.1:9/bucket")


@pytest.mark.parametrize("missing", list(GIVEN))
def test_an_incomplete_configuration_is_rejected_by_name(missing: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        load_settings(**{name: value for name, value in GIVEN.items() if name != missing})

    assert failure.value.message == f"S3 is only half configured: {missing.upper()} must be set too"
    assert_nothing_leaks(failure.value.message)


def test_the_default_bucket_is_that_of_runpods_uploader(s3: S3Server, storages: Make, tmp_path: Path) -> None:
    import_runpod()
    from runpod.serverless.utils.rp_upload import upload_file_to_bucket

    month = time.strftime("%m-%y")
    s3.client.create_bucket(Bucket=month)
    (tmp_path / "theirs.png").write_bytes(b"theirs")
    credentials = {"endpointUrl": s3.url, "accessId": ACCESS_KEY, "accessSecret": SECRET_KEY}
    upload_file_to_bucket("theirs.png", str(tmp_path / "theirs.png"), credentials, prefix="job-1")
    storages(**with_bucket(s3.url)).choose(Delivery()).deliver(deliverable("ours.png"))
    assert set(s3.keys(month)) == {"job-1/theirs.png", "job-1/ours.png"}


def test_the_default_bucket_changes_with_the_month(
    s3: S3Server, storages: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = storages(**with_bucket(s3.url), allow_job_bucket=True, allow_private_urls=True)
    theirs = JobBucket(s3.url, JOB_ACCESS_KEY, JOB_SECRET_KEY)
    months = [s3.create_bucket(), s3.create_bucket()]
    for month in months:
        monkeypatch.setattr(buckets, "bucket_of_the_month", lambda: month)  # noqa: B023 - called in this round
        made.choose(Delivery()).deliver(deliverable("own.png"))
        made.choose(Delivery(), None, theirs).deliver(deliverable("theirs.png"))
    for month in months:
        assert set(s3.keys(month)) == {"job-1/own.png", "job-1/theirs.png"}


def test_s3_without_a_configuration_is_rejected(storages: Make) -> None:
    for kind in ("s3", "both"):
        with pytest.raises(InvalidInput, match="this worker has no bucket"):
            storages().choose(Delivery(type=kind))
