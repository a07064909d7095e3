"""An S3 server and storages made from settings, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from comfy_worker.settings import load_settings
from comfy_worker.storage import StorageFactory
from tests.support.storage.deliveries import RecordingS3
from tests.support.storage.s3_server import S3Server, s3_server


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    return s3.create_bucket()


@pytest.fixture
def storages() -> Iterator[Callable[..., StorageFactory]]:
    """Yield what makes storages from settings, and closes them after the test."""
    made: list[StorageFactory] = []

    def make(**settings: Any) -> StorageFactory:
        made.append(StorageFactory(load_settings(**settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def recorder() -> Iterator[RecordingS3]:
    with closing(RecordingS3()) as recorder:
        yield recorder
