"""What all tests share: how hypothesis searches, and an environment without settings of this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from comfy_worker.gateway.callers import ANYONE, acting_as
from comfy_worker.settings import Settings, list_settings
from tests.support.comfyui.instance import comfyui
from tests.support.processes import forked

# Programs that tests start share the imports of one server.
forked.is_enabled = True

# A developer's .env is no part of a test.
os.environ["ENV_FILE"] = ""

settings.register_profile(
    "project",
    # A machine's speed is no property of the code.
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("project"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the ComfyUI at COMFYUI_URL: the tests of every file that takes its ComfyUI from there."""
    for item in items:
        if isinstance(item, pytest.Function) and comfyui in vars(item.module).values():
            item.add_marker("real")


def pytest_collection_finish() -> None:
    """Leave what the imports made out of the collections after each file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def leftovers() -> Iterator[None]:
    """Have what a file's tests left open complained of with that file, not in whichever test the collector runs."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def whole_programs() -> Iterator[None]:
    """Start the programs of a file's tests as a user does, without the server that has imported their modules."""
    forked.is_enabled = False
    yield
    forked.is_enabled = True


@pytest.fixture(autouse=True)
def caller() -> Iterator[None]:
    """Call the gateway's service as anyone, as a request without keys does; a request to an API brings its own."""
    with acting_as(ANYONE):
        yield


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take every variable that a setting is read from out of the environment; the test puts in its own."""
    names = {name for setting in list_settings(Settings) for name in setting.variables}
    for name in [present for present in os.environ if present.upper() in names]:
        monkeypatch.delenv(name)
    return monkeypatch
