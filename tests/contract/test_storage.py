"""What every storage promises, on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from comfy_worker.errors import Cancelled
from comfy_worker.media.probe import mime_type_of_name
from comfy_worker.stop import Stop
from comfy_worker.storage import DeliverableFile, InMemory, OnDisk, Storage, StorageFactory, Watched, read_all
from comfy_worker.types import Delivered, Delivery, JobBucket
from tests.support.leaks import assert_nothing_leaks
from tests.support.storage.deliveries import (
    CONTENT,
    JOB_ACCESS_KEY,
    JOB_SECRET_KEY,
    LARGE,
    FetchedFile,
    GeneratedContent,
    deliverable,
    open_base64,
    open_both,
    open_url,
    resolve,
    serve_folder,
    with_bucket,
)
from tests.support.storage.s3_server import S3Server

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


def open_local(delivered: Delivered) -> FetchedFile:
    # The type it is served as is up to the server.
    return FetchedFile(open_url(delivered).content, mime_type=None)


OPENERS: dict[str, Callable[[Delivered], FetchedFile]] = {
    "inline": open_base64,
    "auto": open_base64,
    "both": open_both,
    "local": open_local,
}
"""Does what a caller does with what was delivered."""
KINDS = [
    "inline",
    "auto",
    "both",
    "local",
    "s3, bucket in the path",
    "s3, bucket by name",
    "s3, bucket by name and region",
    "s3, bucket in the host",
    "s3, public",
    "s3, bucket of the job",
    "s3, bucket of the job with a region",
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def storage(
    kind: str,
    s3: S3Server,
    bucket: str,
    storages: Callable[..., StorageFactory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Storage]:
    port = urlsplit(s3.url).port
    host = f"{bucket}.s3.us-east-1.amazonaws.com"
    by_name = with_bucket(s3.url, bucket_name=bucket)
    public = {"bucket_public_url": f"{s3.url}/{bucket}/", "bucket_acl": "public-read"}
    settings: dict[str, dict[str, Any]] = {
        "auto": by_name,
        "both": by_name,
        "s3, bucket in the path": with_bucket(f"{s3.url}/{bucket}"),
        "s3, bucket by name": by_name,
        "s3, bucket by name and region": {**by_name, "bucket_region": "eu-central-1"},
        "s3, bucket in the host": with_bucket(f"http://{host}:{port}"),
        "s3, public": {**by_name, **public},
        "s3, bucket of the job": {"allow_job_bucket": True, "allow_private_urls": True},
        "s3, bucket of the job with a region": {"allow_job_bucket": True, "job_bucket_endpoints": "127.0.0.*"},
    }
    if kind == "s3, bucket in the host":
        resolve(monkeypatch, {host: "127.0.0.1"})
    if kind == "local":
        with serve_folder(tmp_path) as url:
            local = {"local_delivery_dir": str(tmp_path), "local_delivery_url": url, "delivery": "local"}
            yield storages(**local).choose(Delivery())
        return
    job_bucket = None
    if "of the job" in kind:
        region = "eu-west-3" if "region" in kind else None
        job_bucket = JobBucket(s3.url, JOB_ACCESS_KEY, JOB_SECRET_KEY, bucket, region)
    wish = Delivery(type="both" if kind == "both" else "auto" if kind == "auto" else None)
    yield storages(**settings.get(kind, {})).choose(wish, None, job_bucket)


@pytest.fixture
def open_delivered(kind: str) -> Callable[[Delivered], FetchedFile]:
    return OPENERS.get(kind, open_url)


Open = Callable[[Delivered], FetchedFile]


def test_files_with_any_name_survive_delivery(storage: Storage, open_delivered: Open) -> None:
    for name in NAMES:
        kept = open_delivered(storage.deliver(deliverable(name)))

        assert kept.content == CONTENT
        assert kept.mime_type in (None, mime_type_of_name(name))


def test_files_of_any_size_survive_delivery(storage: Storage, open_delivered: Open) -> None:
    for content in (b"", b"\x00", b"\xff" * 3_000_000):
        assert open_delivered(storage.deliver(deliverable("a.bin", content))).content == content


def test_many_files_at_once_are_not_mixed_up(storage: Storage, open_delivered: Open) -> None:
    parcels = [deliverable(f"picture {number}.png", bytes([number]) * (1000 + number)) for number in range(32)]
    with ThreadPoolExecutor(8) as threads:
        delivered = list(threads.map(storage.deliver, parcels))
        kept = list(threads.map(open_delivered, delivered))

    assert [item.content for item in kept] == [read_all(item.content) for item in parcels]


def test_one_name_in_two_jobs_is_two_files(storage: Storage, open_delivered: Open) -> None:
    first = storage.deliver(deliverable("same.png", b"first", job_id="job-a"))
    second = storage.deliver(deliverable("same.png", b"second", job_id="job-b"))

    assert open_delivered(first).content == b"first"
    assert open_delivered(second).content == b"second"


def test_a_delivery_never_has_a_local_path(storage: Storage, kind: str) -> None:
    delivered = storage.deliver(deliverable("a.png"))

    assert_nothing_leaks(delivered.data)
    assert "/tmp" not in delivered.data
    if delivered.type != "base64":
        assert urlsplit(delivered.data).scheme == "http"


def test_a_large_file_survives_delivery(
    storage: Storage, open_delivered: Open, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("outputs") / "large.bin"
    path.write_bytes(LARGE)
    large = DeliverableFile("job-1", "large.bin", "application/octet-stream", OnDisk(path, len(LARGE)))

    assert open_delivered(storage.deliver(large)).content == LARGE


@pytest.mark.parametrize("size", [len(LARGE), 3 * 1024 * 1024], ids=["large", "small"])
def test_cancelling_a_job_aborts_its_delivery(storage: Storage, size: int) -> None:
    stop = Stop()
    content = Watched(GeneratedContent(size, before_last=stop.set), stop.check)
    with pytest.raises(Cancelled):
        storage.deliver(DeliverableFile("job-c", "a.bin", "application/octet-stream", content))


def test_no_files_are_read_after_a_cancel() -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled):
        read_all(Watched(InMemory(b"content"), stop.check))
