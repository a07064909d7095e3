"""What all tests share: how hypothesis searches, and an environment without settings of this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from comfy_worker.gateway.callers import ANYONE, acting_as
from comfy_worker.settings import Settings, list_settings

# A developer's .env is no part of a test.
os.environ["ENV_FILE"] = ""

settings.register_profile(
    "project",
    # A machine's speed is no property of the code.
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


@pytest.fixture(scope="module", autouse=True)
def leftovers() -> Iterator[None]:
    """Have what a file's tests left open complained of with that file, not in whichever test the collector runs."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def caller() -> Iterator[None]:
    """Call the gateway's service as anyone, as a request without keys does; a request to a door brings its own."""
    with acting_as(ANYONE):
        yield


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take every variable that a setting is read from out of the environment; the test puts in its own."""
    names = {name for setting in list_settings(Settings) for name in setting.variables}
    for name in [present for present in os.environ if present.upper() in names]:
        monkeypatch.delenv(name)
    return monkeypatch
