"""What every storage promises, on each of them; and what S3 promises besides."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import requests

from comfy_worker.errors import DeliveryFailed, InvalidInput
from comfy_worker.jobs import Delivered, Delivery
from comfy_worker.media import mime_type_of_name
from comfy_worker.settings import Settings, load_settings
from comfy_worker.storage import Parcel, Storage, Storages
from tests.support.leaks import assert_nothing_leaks
from tests.support.ports import silent_port
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server, s3_server

NAMES = [
    "ComfyUI_00001_.png",
    "my picture (1).png",
    "sub/folder/ComfyUI_00001_.png",
    "Größe é/日本語 写真.webp",
    "🎨 picture.jpg",
    "100% a+b&c=d?e#f;g'h\"i~.png",
    "clip.mp4",
    "speech.flac",
    "mesh.glb",
    "without_extension",
]
CONTENT = bytes(range(256)) * 41


@dataclass(frozen=True)
class Kept:
    """What a caller finds where the storage said."""

    content: bytes
    mime_type: str | None


Open = Callable[[Delivered], Kept]
"""Does what a caller does with what was delivered."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    return s3.create_bucket()


def s3_settings(endpoint_url: str, **more: Any) -> Settings:
    return load_settings(
        bucket_endpoint_url=endpoint_url,
        bucket_access_key_id=ACCESS_KEY,
        bucket_secret_access_key=SECRET_KEY,
        **more,
    )


def open_base64(delivered: Delivered) -> Kept:
    assert delivered.type == "base64"
    return Kept(base64.b64decode(delivered.data, validate=True), mime_type=None)


def open_url(delivered: Delivered) -> Kept:
    assert delivered.type == "s3_url"
    response = requests.get(delivered.data, timeout=10)
    assert response.status_code == 200, response.text
    return Kept(response.content, response.headers["Content-Type"])


@pytest.fixture(params=["inline", "s3, bucket in the path", "s3, bucket by name"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def storage(kind: str, s3: S3Server, bucket: str) -> Storage:
    if kind == "inline":
        return Storages(load_settings()).choose(Delivery())
    by_name = kind.endswith("name")
    settings = s3_settings(s3.url, bucket_name=bucket) if by_name else s3_settings(f"{s3.url}/{bucket}")
    return Storages(settings).choose(Delivery())


@pytest.fixture
def open_delivered(kind: str) -> Open:
    return open_base64 if kind == "inline" else open_url


def parcel(path: str, content: bytes = CONTENT, job_id: str = "job-1") -> Parcel:
    return Parcel(job_id=job_id, path=path, mime_type=mime_type_of_name(path), content=content)


# -------------------------------------------------------------------------------------------- every storage


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_comes_back_as_it_was(storage: Storage, open_delivered: Open, name: str) -> None:
    kept = open_delivered(storage.deliver(parcel(name)))

    assert kept.content == CONTENT
    assert kept.mime_type in (None, mime_type_of_name(name))


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 3_000_000], ids=["empty", "one byte", "3 MB"])
def test_a_file_of_any_size_comes_back_as_it_was(storage: Storage, open_delivered: Open, content: bytes) -> None:
    assert open_delivered(storage.deliver(parcel("a.bin", content))).content == content


def test_many_files_at_once_are_not_mixed_up(storage: Storage, open_delivered: Open) -> None:
    parcels = [parcel(f"picture {number}.png", bytes([number]) * (1000 + number)) for number in range(32)]
    with ThreadPoolExecutor(8) as threads:
        delivered = list(threads.map(storage.deliver, parcels))
        kept = list(threads.map(open_delivered, delivered))

    assert [item.content for item in kept] == [item.content for item in parcels]


def test_the_same_name_in_two_jobs_is_two_files(storage: Storage, open_delivered: Open) -> None:
    first = storage.deliver(parcel("same.png", b"first", job_id="job-a"))
    second = storage.deliver(parcel("same.png", b"second", job_id="job-b"))

    assert open_delivered(first).content == b"first"
    assert open_delivered(second).content == b"second"


def test_what_is_delivered_is_never_a_local_path(storage: Storage, kind: str) -> None:
    delivered = storage.deliver(parcel("a.png"))

    assert_nothing_leaks(delivered.data)
    assert "/tmp" not in delivered.data
    if kind != "inline":
        assert urlsplit(delivered.data).scheme == "http"


# -------------------------------------------------------------------------------------------------- S3 besides


def test_the_object_lies_under_the_job_and_opens_under_its_name(s3: S3Server, bucket: str) -> None:
    storage = Storages(s3_settings(f"{s3.url}/{bucket}")).choose(Delivery())
    delivered = storage.deliver(parcel("größe/my picture.png", job_id="job-7"))

    assert unquote(urlsplit(delivered.data).path) == f"/{bucket}/job-7/größe/my picture.png"
    assert s3.read(bucket, "job-7/größe/my picture.png").content_type == "image/png"
    disposition = requests.get(delivered.data, timeout=10).headers["Content-Disposition"]
    assert disposition == "inline; filename*=UTF-8''my%20picture.png"


def test_a_job_may_choose_folder_and_expiry(s3: S3Server, bucket: str) -> None:
    storages = Storages(s3_settings(f"{s3.url}/{bucket}", bucket_url_expires_s=1234))
    chosen = storages.choose(Delivery(type="s3", prefix="customers/7", expires_s=60)).deliver(parcel("a.png"))
    default = storages.choose(Delivery(type="auto")).deliver(parcel("a.png"))

    assert urlsplit(chosen.data).path == f"/{bucket}/customers/7/a.png"
    assert expiry_of(chosen) == 60
    assert urlsplit(default.data).path == f"/{bucket}/job-1/a.png"
    assert expiry_of(default) == 1234


def expiry_of(delivered: Delivered) -> int:
    return int(parse_qs(urlsplit(delivered.data).query)["X-Amz-Expires"][0])


def test_a_job_may_have_base64_in_spite_of_a_bucket(s3: S3Server, bucket: str) -> None:
    storage = Storages(s3_settings(f"{s3.url}/{bucket}")).choose(Delivery(type="base64"))

    assert open_base64(storage.deliver(parcel("a.png"))).content == CONTENT


def test_a_url_does_not_carry_the_secret_key(s3: S3Server, bucket: str) -> None:
    delivered = Storages(s3_settings(f"{s3.url}/{bucket}")).choose(Delivery()).deliver(parcel("a.png"))

    assert SECRET_KEY not in unquote(delivered.data)


# ---------------------------------------------------------------------------------------------------- failure


def test_a_bucket_that_is_not_there_is_named_without_a_secret(s3: S3Server) -> None:
    storage = Storages(s3_settings(f"{s3.url}/no-such-bucket")).choose(Delivery())
    with pytest.raises(DeliveryFailed) as failure:
        storage.deliver(parcel("a.png"))

    assert failure.value.message == "S3 refused a.png for bucket 'no-such-bucket': NoSuchBucket"
    assert_secrets_are_kept(failure.value)


def test_a_host_that_does_not_answer_is_an_error_without_a_secret() -> None:
    with silent_port() as port:
        storage = Storages(s3_settings(f"http://127.0.0.1:{port}/bucket")).choose(Delivery())
        with pytest.raises(DeliveryFailed) as failure:
            storage.deliver(parcel("a.png"))

    assert failure.value.message == "S3 could not be reached to store a.png: EndpointConnectionError"
    assert_secrets_are_kept(failure.value)


def assert_secrets_are_kept(failure: DeliveryFailed) -> None:
    assert failure.retryable
    for text in (failure.message, str(failure.as_output())):
        assert_nothing_leaks(text)
        assert ACCESS_KEY not in text


GIVEN = {
    "bucket_endpoint_url": "http://127.0.0.1:9/bucket",
    "bucket_access_key_id": ACCESS_KEY,
    "bucket_secret_access_key": SECRET_KEY,
}


@pytest.mark.parametrize("missing", list(GIVEN))
def test_half_a_configuration_is_refused_by_name(missing: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        load_settings(**{name: value for name, value in GIVEN.items() if name != missing})

    assert failure.value.message == f"S3 is only half configured: {missing.upper()} must be set too"
    assert_nothing_leaks(failure.value.message)


def test_an_endpoint_without_a_bucket_is_refused(s3: S3Server) -> None:
    with pytest.raises(InvalidInput, match="No bucket is named"):
        Storages(s3_settings(s3.url)).choose(Delivery())


def test_s3_without_a_configuration_is_refused() -> None:
    with pytest.raises(InvalidInput, match="this worker has no bucket"):
        Storages(load_settings()).choose(Delivery(type="s3"))
