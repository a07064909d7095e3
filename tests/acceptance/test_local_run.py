"""`python handler.py` at a desk: one job, its progress, its files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, comfyui
from tests.support.leaks import assert_nothing_leaks
from tests.support.network.webhook_receiver import Receiver
from tests.support.paths import ROOT
from tests.support.processes.process import Process, start_handler
from tests.support.storage.s3_server import SECRET_KEY

pytestmark = pytest.mark.usefixtures("whole_programs")

ORANGE = (255, 128, 0)
GREEN = (0, 200, 40)


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> dict[str, Any]:
        """What was written to standard output, which is JSON and nothing else."""
        answer: dict[str, Any] = json.loads(self.stdout)
        return answer


@dataclass(frozen=True)
class LocalRun:
    """A folder to work in and a ComfyUI."""

    comfy: ComfyUI
    folder: Path

    @property
    def outputs(self) -> Path:
        """Where outputs are written."""
        return self.folder / "results"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of handler.py."""
        return {"COMFYUI_URL": self.comfy.url, "OUTPUT_DIR": str(self.outputs)}

    def run(self, *arguments: str, cwd: Path | None = None, settings: Mapping[str, str] | None = None) -> Finished:
        with start_handler({**self.environment, **(settings or {})}, *arguments, cwd=cwd or self.folder) as process:
            code = process.wait()
        assert_nothing_leaks(process.output)
        return Finished(code, process.stdout, process.stderr)


def option(job_input: Any) -> str:
    return f"--test_input={json.dumps({'input': job_input})}"


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture
def local_run(comfy: ComfyUI, tmp_path: Path) -> LocalRun:
    return LocalRun(comfy, tmp_path)


# ---------------------------------------------------------------------------------------------------- success


def test_the_projects_example_job_runs_unchanged(local_run: LocalRun) -> None:
    finished = local_run.run(cwd=ROOT)

    assert finished.code == 0, finished
    [image] = finished.answer["images"]
    content = Path(image["saved_as"]).read_bytes()
    assert Path(image["saved_as"]).parent == local_run.outputs
    assert len(content) == image["size_bytes"]
    assert len(graphs.colors(content)) > 1
    assert re.fullmatch(r"[A-Za-z0-9+/]{24}… \(\d+ characters\)", image["data"])


def test_a_job_on_the_command_line_writes_its_files(local_run: LocalRun) -> None:
    finished = local_run.run(option({"workflow": graphs.two_pictures(ORANGE, GREEN)}))

    assert finished.code == 0, finished
    assert [image["saved_as"] for image in finished.answer["images"]] == [
        str(local_run.outputs / "ComfyUI_00001_.png"),
        str(local_run.outputs / "sub" / "ComfyUI_00001_.png"),
    ]
    assert graphs.colors((local_run.outputs / "ComfyUI_00001_.png").read_bytes()) == [ORANGE]
    assert graphs.colors((local_run.outputs / "sub" / "ComfyUI_00001_.png").read_bytes()) == [GREEN]


def test_the_command_runs_a_job_from_a_file(local_run: LocalRun) -> None:
    (local_run.folder / "job.json").write_text(json.dumps({"input": {"workflow": graphs.picture(GREEN)}}))
    command = [sys.executable, "-m", "comfy_worker", "run", "--output-dir", "there", "job.json"]
    environment = {**local_run.environment, "PYTHONPATH": str(ROOT / "src")}
    with Process(command, environment=environment, cwd=local_run.folder) as process:
        assert process.wait() == 0, process.output
    [image] = json.loads(process.stdout)["images"]
    assert image["saved_as"] == "there/ComfyUI_00001_.png"
    assert graphs.colors((local_run.folder / image["saved_as"]).read_bytes()) == [GREEN]


def test_files_of_earlier_runs_are_kept(local_run: LocalRun) -> None:
    (local_run.outputs / "ComfyUI_00001_.png").parent.mkdir()
    (local_run.outputs / "ComfyUI_00001_.png").write_bytes(b"earlier")
    finished = local_run.run("--test_input", json.dumps({"input": {"workflow": graphs.picture(GREEN)}}))

    assert finished.code == 0, finished
    assert (local_run.outputs / "ComfyUI_00001_.png").read_bytes() == b"earlier"
    assert graphs.colors((local_run.outputs / "ComfyUI_00001_ (1).png").read_bytes()) == [GREEN]


# --------------------------------------------------------------------------------------------------- progress


def test_steps_are_logged_without_a_terminal(local_run: LocalRun) -> None:
    finished = local_run.run(option({"workflow": graphs.work(0.05, steps=5)}))

    lines = finished.stderr.splitlines()
    assert finished.code == 0, finished
    assert all(re.fullmatch(r" *\d+% \S.*", line) for line in lines), lines
    percents = [int(line.partition("%")[0]) for line in lines]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert lines[-1] == "100% delivering"
    assert any(line.endswith("node 3: TestWork") for line in lines)


@pytest.mark.parametrize("columns", [100, 0], ids=["wide", "of unknown size"])
def test_a_terminal_shows_a_progress_bar(local_run: LocalRun, columns: int) -> None:
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    arguments = option({"workflow": graphs.work(0.5, steps=10)})
    try:
        process = start_handler(local_run.environment, arguments, cwd=local_run.folder, stderr=inner)
    finally:
        os.close(inner)
    with process:
        shown = read_terminal(outer)
        code = process.wait()

    assert code == 0, shown
    assert_nothing_leaks(shown)
    percents = [int(number) for number in re.findall(r"(\d+)% \|", shown)]
    assert percents == sorted(percents)
    assert percents[-1:] == [100], shown
    assert any(0 < percent < 100 for percent in percents)
    assert "█" in shown
    assert re.search(r"node 3: TestWork \d+/10", shown)
    assert json.loads(process.stdout)["images"]


def read_terminal(outer: int) -> str:
    """Return all that is written to a pseudo-terminal until nobody has it open any more."""
    shown = b""
    # Linux says EIO at the end.
    with contextlib.suppress(OSError):
        while chunk := os.read(outer, 4096):
            shown += chunk
    os.close(outer)
    return shown.decode()


# ---------------------------------------------------------------------------------------------------- failure


def test_a_failed_job_exits_with_1_and_its_error(local_run: LocalRun) -> None:
    finished = local_run.run(option({"workflow": graphs.work(0.01, steps=1, fail_at=1)}))

    assert finished.code == 1
    assert finished.answer["error"].startswith("Workflow execution error: Node Type: TestWork, Node ID: 3, Message: ")
    assert not local_run.outputs.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--test_input", "{bad"], r"--test_input is not JSON: .*line 1 column 2.*"),
        (["--test_input", "[1]"], r"--test_input must be an object with an input"),
        (["--test_input", "{}"], r"Please provide input"),
        ([], r"test_input\.json cannot be read in the current folder: No such file or directory"),
    ],
)
def test_a_missing_job_is_an_error_with_a_reason(local_run: LocalRun, arguments: list[str], sentence: str) -> None:
    finished = local_run.run(*arguments)

    assert finished.code == 1
    assert finished.answer["code"] == "invalid_input"
    assert re.fullmatch(sentence, finished.answer["error"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"WORKFLOW_TIMEOUT": "soon"}, "Invalid settings: WORKFLOW_TIMEOUT: Input should be a valid number"),
        (
            {"BUCKET_SECRET_ACCESS_KEY": SECRET_KEY},
            "S3 is only half configured: BUCKET_ENDPOINT_URL and BUCKET_ACCESS_KEY_ID must be set too",
        ),
    ],
)
def test_an_invalid_setting_exits_with_2_at_once(local_run: LocalRun, settings: dict[str, str], sentence: str) -> None:
    finished = local_run.run(option({"workflow": graphs.picture(ORANGE)}), settings=settings)

    assert finished.code == 2
    assert finished.stdout == ""
    assert finished.stderr.strip().startswith(sentence)


# ----------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_comfyui_before_the_process_exits(
    local_run: LocalRun, number: signal.Signals
) -> None:
    with start_handler(local_run.environment, option({"workflow": graphs.work(60)}), cwd=local_run.folder) as process:
        local_run.comfy.wait_until_running()
        process.send_signal(number)
        assert process.wait() == -number
    assert local_run.comfy.queue() == []
    assert json.loads(process.stdout) == {"error": "The job was cancelled", "code": "cancelled"}
    assert_nothing_leaks(process.output)


def test_a_second_interrupt_exits_at_once(local_run: LocalRun) -> None:
    with Receiver("hang") as receiver:
        settings = {**local_run.environment, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}
        arguments = option({"workflow": graphs.work(60), "webhook": {"url": receiver.url}})
        with start_handler(settings, arguments, cwd=local_run.folder) as process:
            local_run.comfy.wait_until_running()
            process.send_signal(signal.SIGINT)
            receiver.wait_for(1)
            process.send_signal(signal.SIGINT)
            assert process.wait() == -signal.SIGINT
    assert "given up" not in process.output
    assert_nothing_leaks(process.output)
