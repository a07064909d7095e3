"""A local run: one job with a progress bar, whose outputs are written into a folder."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.job.envelope import LOCAL_JOB_ID
from comfy_worker.job.progress import Progress
from comfy_worker.settings import Settings
from comfy_worker.signals import END_SIGNALS, in_thread
from comfy_worker.stop import Stop
from comfy_worker.strict_json import InvalidJson, parse_json
from comfy_worker.types import JobEvent, Kind, NodeStarted, Notice, Stage, StageStarted
from comfy_worker.worker import Worker

DEFAULT_FILE = "test_input.json"
"""The job without `--test_input`, as for RunPod's SDK."""
_SHOWN_BASE64 = 24


def parse_test_input(arguments: Sequence[str]) -> str | None:
    """Return the job on the command line of `python handler.py`; None if there is none."""
    parser = argparse.ArgumentParser(
        description=f"Run one job on ComfyUI: the one given by --test_input, or else the one in {DEFAULT_FILE}.",
        epilog="Settings are environment variables, such as COMFYUI_URL; `comfy-worker run --help` lists them all. "
        "With --rp_serve_api, RunPod's SDK serves its API for development.",
    )
    add_test_input(parser)
    options, _others = parser.parse_known_args(arguments)
    job: str | None = options.test_input
    return job


def add_test_input(parser: argparse.ArgumentParser) -> None:
    """Add the option with the job."""
    parser.add_argument("--test_input", metavar="JSON", help='the job as JSON: {"input": {"workflow": {…}}}')


def main(text: str | None, file: str, settings: Settings) -> int:
    """Run the job in `text`, or else in a file; print its output and return the exit code of the process."""
    interruption = Interruption()
    try:
        output = run(read_job(text, file), settings, interruption)
    except WorkerError as error:
        output = error.as_output()
    print(json.dumps(output, indent=2, ensure_ascii=False), flush=True)
    interruption.raise_signal()
    return 1 if "error" in output else 0


class Interruption:
    """Handles SIGINT and SIGTERM: the first one stops a running job, any other one ends the process."""

    def __init__(self) -> None:
        self.stop = Stop()
        self._number: signal.Signals | None = None
        self._use_default_handlers()

    def on_signal(self, number: signal.Signals) -> None:
        """Stop the job."""
        self._number = number
        self._use_default_handlers()
        self.stop.set()

    def raise_signal(self) -> None:
        """End the process with the signal that stopped the job, if one did, so that a shell's loop ends too."""
        if self._number is not None:
            signal.raise_signal(self._number)

    def _use_default_handlers(self) -> None:
        for number in END_SIGNALS:
            # Python's own handler would print a traceback.
            signal.signal(number, signal.SIG_DFL)


def read_job(text: str | None, file: str = DEFAULT_FILE) -> dict[str, Any]:
    """Return the job in `text`, or else in a file.

    Raises:
        InvalidInput: the file cannot be read, or the job is not a JSON object.
    """
    source = "--test_input"
    if text is None:
        source = file
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            where = "" if Path(file).is_absolute() else " in the current folder"
            raise InvalidInput(f"{file} cannot be read{where}: {error.strerror}") from None
    try:
        job = parse_json(text)
    except InvalidJson as problem:
        raise InvalidInput(f"{source} {problem}") from None
    if not isinstance(job, dict):
        raise InvalidInput(f"{source} must be an object with an input")
    return {"id": LOCAL_JOB_ID, **job}


def run(job: dict[str, Any], settings: Settings, interruption: Interruption) -> dict[str, Any]:
    """Run a job, show its progress, and write its base64 outputs into files."""
    worker = Worker(settings)
    try:
        with closing(ProgressBar()) as bar:
            output = asyncio.run(
                in_thread(lambda: worker.run(job, bar.show, interruption.stop), interruption.on_signal)
            )
    finally:
        worker.close()
    return write_files(output, Path(settings.output_dir))


class ProgressBar:
    """Shows a job's progress on standard error: a bar in a terminal, a line per node elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress()
        is_terminal = sys.stderr.isatty()
        # tqdm would show nothing in a terminal of unknown width.
        columns = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) if is_terminal else None
        bar_format = "{percentage:3.0f}% |{bar:30}| {elapsed} {desc}"
        self._bar = tqdm(total=100, file=sys.stderr, disable=not is_terminal, bar_format=bar_format, ncols=columns)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def show(self, event: JobEvent) -> None:
        """Apply an event and show the progress."""
        self._progress.apply(event)
        if self._bar.disable:
            if isinstance(event, (NodeStarted, Notice, StageStarted)):
                print(f"{self._progress.percent:3.0f}% {self._description()}", file=sys.stderr, flush=True)
            return
        self._bar.n = round(self._progress.percent)
        self._bar.set_description_str(self._description(), refresh=True)

    def _description(self) -> str:
        progress = self._progress
        if progress.notice:
            return progress.notice
        if progress.stage is Stage.RUNNING and progress.node_id:
            steps = f" {progress.step:g}/{progress.steps:g}" if progress.steps > 1 else ""
            return f"node {progress.node_id}: {progress.title}{steps}"
        if progress.stage is Stage.QUEUED and progress.ahead:
            return f"queued behind {progress.ahead}"
        return progress.stage.value


def write_files(output: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write every base64 output into `folder`, and return the output with the data shortened."""
    shown = dict(output)
    for kind in Kind:
        if kind.value in output:
            shown[kind.value] = [_write_file(item, folder) for item in output[kind.value]]
    return shown


def _write_file(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    if item["type"] != "base64":
        return item
    path = _free_path(folder / str(item["subfolder"]) / str(item["filename"]))
    if not path.resolve().is_relative_to(folder.resolve()):
        # A node can report any name.
        path = _free_path(folder / path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(item["data"]))
    data: str = item["data"]
    shortened = data if len(data) <= _SHOWN_BASE64 else f"{data[:_SHOWN_BASE64]}… ({len(data)} characters)"
    return {**item, "data": shortened, "saved_as": str(path)}


def _free_path(path: Path) -> Path:
    """Return `path` or, if it exists, a path with the first free number."""
    candidate, number = path, 1
    while candidate.exists():
        candidate = path.with_name(f"{path.stem} ({number}){path.suffix}")
        number += 1
    return candidate
