"""RunPod's JavaScript SDK as npm has it; `make setup` installs it where there is Node."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S

_SCRIPT = ROOT / "tests" / "data" / "clients" / "runpod_sdk.mjs"
_SDK = Path(sys.prefix) / "clients" / "node_modules" / "runpod-sdk"


class Raised(Exception):
    """The SDK raised an error.

    Attributes:
        status: of the answer, if there was one.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RunpodSdk:
    """An endpoint of the SDK; each call is a program of its own."""

    base_url: str
    key: str

    def __post_init__(self) -> None:
        for program in ("node", "npm"):
            if shutil.which(program) is None:
                pytest.skip(f"there is no {program} on this machine, and RunPod's JavaScript SDK needs it")
        if not _SDK.is_dir():
            pytest.skip("RunPod's JavaScript SDK is not installed: make setup does it")

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Return what a method returns, a list of all that an iterator gives."""
        with self.calling(method, *arguments) as process:
            return result_of(process)

    @contextmanager
    def calling(self, method: str, *arguments: Any) -> Iterator[Process]:
        """Call a method; its process is on its way."""
        with Process(["node", _SCRIPT, _SDK, self.base_url, self.key, method, json.dumps(arguments)]) as process:
            yield process


def result_of(process: Process) -> Any:
    """Return what a call returned, when it has; raise what it raised."""
    assert process.wait(TIMEOUT_S) == 0, process.output
    outcome = json.loads(process.stdout.splitlines()[-1])
    if "raised" in outcome:
        raise Raised(outcome["raised"]["message"], outcome["raised"].get("status"))
    return outcome["returned"]
