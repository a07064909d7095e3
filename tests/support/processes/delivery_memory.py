"""One output delivered in a process of its own, to see how much memory that takes.

    python -m tests.support.processes.delivery_memory FILENAME [--type TYPE] [--first FILENAME]

Prints a line of JSON. The settings come from the environment; the output is one of ComfyUI's folder `output`.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.job.outputs import FoundOutputs, deliver_outputs
from comfy_worker.media.probe import kind_of
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.types import Delivery, Job, OutputFile
from tests.support.paths import ROOT
from tests.support.processes.process import clean_environment

_MB = 1024 * 1024


def deliver_in_child(
    filename: str, environment: Mapping[str, str], *, kind: str = "s3", first: str | None = None
) -> dict[str, Any]:
    """Return what a child process says: `idle_mb`, `peak_mb`, `seconds`, `type` and `characters`."""
    command = [sys.executable, "-m", "tests.support.processes.delivery_memory", filename, "--type", kind]
    done = subprocess.run(
        [*command, *(["--first", first] if first else [])],
        env=clean_environment(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def output_file(filename: str) -> OutputFile:
    """Return a file as a node reports it."""
    return OutputFile(filename, "", "output", kind_of(filename), "9", "SaveVideo", "Save", 0)


def main() -> None:
    """Deliver the first file to warm up, and measure the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filename")
    parser.add_argument("--type", default="s3")
    parser.add_argument("--first")
    options = parser.parse_args()
    settings = load_settings()
    with closing(ComfyClient(settings)) as client, closing(StorageFactory(settings)) as storages:
        if options.first:
            _deliver(options.first, options.type, client, storages)
        gc.collect()
        # The kernel's high-water mark starts anew from what is in use now.
        Path("/proc/self/clear_refs").write_text("5")
        idle_mb, began = _megabytes("VmRSS"), time.perf_counter()
        [artifact] = _deliver(options.filename, options.type, client, storages)
        seconds = time.perf_counter() - began
    said = {
        "idle_mb": idle_mb,
        "peak_mb": _megabytes("VmHWM"),
        "seconds": seconds,
        "type": artifact.delivered.type,
        "characters": len(artifact.delivered.data),
        "mime_type": artifact.mime_type,
    }
    sys.stdout.write(json.dumps(said))


def _deliver(filename: str, kind: Any, client: ComfyClient, storages: StorageFactory) -> Any:
    job = Job(id="memory", prompt_id="memory", workflow={}, delivery=Delivery(type=kind))
    found = FoundOutputs(files=(output_file(filename),), texts=())
    delivered = deliver_outputs(job, found, client, storages.choose(job.delivery), Stop())
    assert not delivered.warnings, delivered.warnings
    return delivered.artifacts


def _megabytes(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, status
    return int(found[1]) * 1024 / _MB


if __name__ == "__main__":
    main()
