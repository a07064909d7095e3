"""start.sh as the container runs it: a real process with a small stand-in for ComfyUI and for the worker."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes.start_sh import (
    DYING_COMFYUI,
    PARENT_COMFYUI,
    PATIENT_HANDLER,
    START,
    STUBBORN_COMFYUI,
    TALKATIVE_COMFYUI,
    WAITING_HANDLER,
    Container,
    write_program,
)

COMFYUI_IS_UP = r'^comfyui {.*"pid": (\d+)'


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    container = Container(tmp_path)
    yield container
    for started in container.started:
        started.stop(20)


@pytest.fixture
def waiting(container: Container) -> Container:
    """With a worker that waits for a signal."""
    container.install_handler(WAITING_HANDLER)
    return container


def has_ended(pid: int) -> bool:
    """Whether the process ends, or did; 10 s are for one that is shutting down."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return select.select([process], [], [], 10)[0] == [process]
    finally:
        os.close(process)


def report_of(output: str, who: str) -> dict[str, object]:
    """What a stand-in reported about itself."""
    line = next(line for line in output.splitlines() if line.startswith(f"{who} {{"))
    about: dict[str, object] = json.loads(line.removeprefix(f"{who} "))
    return about


def only_error(output: str) -> str:
    found = re.fullmatch(r"start\.sh: (.*\.)\n", output)
    assert found, output
    return found[1]


def test_shellcheck_passes() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, START], text=True, capture_output=True, check=False)
    assert checked.stdout + checked.stderr == ""
    assert checked.returncode == 0


def test_every_variable_is_documented() -> None:
    read = set(re.findall(r"\$\{([A-Z][A-Z_]*):?-", START.read_text())) - {"TMPDIR"}
    section = (ROOT / "docs/how-to/deploy.md").read_text().partition("## What start.sh does")[2]
    assert read == set(re.findall(r"^\| `([A-Z_]+)` \|", section, re.MULTILINE))


class TestEnvFile:
    def test_sets_what_start_sh_and_the_worker_read(self, container: Container) -> None:
        for name in ("COMFYUI_DIR", "COMFYUI_PYTHON", "COMFY_CPU"):
            del container.env[name]
        lines = ["COMFYUI_DIR=none", "COMFYUI_URL=http://comfy:1", "HANDLER_EXIT=4", "COMFYUI_BASE_DIRECTORY='a b'"]
        (container.folder / ".env").write_text("\n".join(lines))
        code, output = container.run(ENV_FILE=".env", COMFYUI_BASE_DIRECTORY="mine")
        assert code == 4
        env = report_of(output, "handler")["env"]
        assert isinstance(env, dict)
        assert (env["COMFYUI_URL"], env["COMFYUI_BASE_DIRECTORY"]) == ("http://comfy:1", "mine")

    def test_must_exist(self, container: Container) -> None:
        code, output = container.run(ENV_FILE="nowhere")
        assert code == 2
        assert "The file nowhere with settings cannot be read: No such file or directory" in output
        assert "Traceback" not in output


class TestRejected:
    def test_no_comfyui(self, container: Container) -> None:
        code, output = container.run(COMFYUI_DIR="none")
        assert code == 2
        sentence = only_error(output)
        for name in ("COMFYUI_DIR", "COMFYUI_URL", "COMFY_EMULATOR=true"):
            assert name in sentence

    def test_a_comfyui_dir_without_comfyui_even_when_another_is_named(self, container: Container) -> None:
        code, output = container.run(COMFYUI_DIR="/nowhere", COMFYUI_URL="http://127.0.0.1:1")
        assert code == 2
        assert "/nowhere" in only_error(output)

    def test_no_gpu(self, container: Container) -> None:
        container.install_command("nvidia-smi", "exit 9\n")
        code, output = container.run(COMFY_CPU="false")
        assert code == 1
        assert "COMFY_CPU=true" in only_error(output)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("COMFY_LOG_LEVEL", "loud"),
            ("COMFYUI_PORT", "eighty"),
            ("COMFYUI_PORT", "65536"),
            ("COMFYUI_PYTHON", "/nowhere/python"),
            ("WORKER_PYTHON", "/nowhere/python"),
            ("WORKER_HANDLER", "/nowhere/handler.py"),
        ],
    )
    def test_an_invalid_setting(self, container: Container, name: str, value: str) -> None:
        code, output = container.run(**{name: value})
        assert code == 2
        sentence = only_error(output)
        assert name in sentence
        assert value in sentence

    @pytest.mark.parametrize("ports", [{"PORT": "0"}, {"API_PORT": "eighty", "PORT": "8000"}])
    def test_an_invalid_gateway_port(self, container: Container, ports: dict[str, str]) -> None:
        code, output = container.run(SERVE_API_LOCALLY="true", **ports)
        assert code == 2
        assert only_error(output).startswith(next(iter(ports)))

    def test_a_comfyui_without_a_virtual_environment(self, container: Container) -> None:
        del container.env["COMFYUI_PYTHON"]
        code, output = container.run()
        assert code == 2
        assert "COMFYUI_PYTHON" in only_error(output)


class TestGpu:
    """With a libcuda of our own, whose first call answers what the test wants."""

    def install_gpu(self, container: Container, cuinit_answers: int) -> dict[str, str]:
        compiler = shutil.which("cc") or pytest.skip("a C compiler is needed to build a stand-in for libcuda")
        source = container.folder / "cuda.c"
        source.write_text(f"int cuInit(unsigned flags) {{ return {cuinit_answers}; }}\n")
        library = container.folder / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        container.install_command("nvidia-smi", "echo 'GPU 0: NVIDIA Test (UUID: GPU-0)'\n")
        return {"COMFY_CPU": "false", "LD_LIBRARY_PATH": str(container.folder)}

    def test_working_gpu(self, waiting: Container) -> None:
        started = waiting.start(**self.install_gpu(waiting, 0))
        started.wait_for_line(COMFYUI_IS_UP)
        started.wait_for_line("handler waits")
        assert "--cpu" not in str(report_of(started.output, "comfyui")["args"])

    def test_gpu_without_working_cuda(self, container: Container) -> None:
        code, output = container.run(**self.install_gpu(container, 999))
        assert code == 1
        assert "CUDA" in only_error(output)


class TestWorker:
    def test_gets_its_arguments_unchanged(self, container: Container) -> None:
        args = ["--test_input", '{"input": {"text": "a  b\'c"}}', "", "*"]
        code, output = container.run(*args)
        assert code == 0
        assert report_of(output, "handler")["args"] == args

    def test_runs_in_the_folder_of_start_sh(self, container: Container) -> None:
        _, output = container.run()
        assert report_of(output, "handler")["cwd"] == str(ROOT)

    def test_is_found_relative_to_the_callers_folder(self, container: Container) -> None:
        (container.folder / "python").symlink_to(sys.executable)
        code, output = container.run(
            WORKER_PYTHON="./python", WORKER_HANDLER="handler.py", COMFYUI_DIR="ComfyUI", COMFYUI_PYTHON="./python"
        )
        assert code == 0
        assert report_of(output, "handler")["cwd"] == str(ROOT)

    @pytest.mark.parametrize("exit_code", [0, 1, 42])
    def test_determines_the_exit_code(self, container: Container, exit_code: int) -> None:
        code, _ = container.run(HANDLER_EXIT=str(exit_code))
        assert code == exit_code

    def test_gets_the_location_of_comfyui(self, container: Container) -> None:
        _, output = container.run(COMFYUI_PORT="8299")
        env = report_of(output, "handler")["env"]
        assert isinstance(env, dict)
        assert env["COMFYUI_URL"] == "http://127.0.0.1:8299"
        assert str(env["COMFYUI_PID_FILE"]).startswith(str(container.tmp))

    def test_gets_the_images_location_of_comfyui(self, container: Container) -> None:
        """Without COMFYUI_DIR; only the image has that folder, so this start.sh has another in its place."""
        text = START.read_text().replace("/opt/comfyui/ComfyUI", str(container.comfyui))
        container.script = write_program(container.folder / "start.sh", text)
        del container.env["COMFYUI_DIR"]
        code, output = container.run()
        env = report_of(output, "handler")["env"]
        assert code == 0
        assert isinstance(env, dict)
        assert env["COMFYUI_BASE_DIRECTORY"] == str(container.comfyui)

    def test_stops_comfyui_when_it_exits(self, waiting: Container) -> None:
        started = waiting.start()
        comfyui = started.wait_for_line(COMFYUI_IS_UP)
        handler = started.wait_for_line(r"handler waits (\d+)")
        os.kill(int(handler[1]), signal.SIGKILL)
        assert started.wait() == 128 + signal.SIGKILL
        assert "comfyui stops" in started.output
        assert has_ended(int(comfyui[1]))
        assert list(waiting.tmp.iterdir()) == []


class TestSignals:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_reach_the_worker_before_comfyui(self, waiting: Container, signum: signal.Signals) -> None:
        started = waiting.start()
        comfyui = started.wait_for_line(COMFYUI_IS_UP)
        started.wait_for_line("handler waits")
        started.send_signal(signum)
        assert started.wait() == 7
        assert started.stdout.endswith(f"handler got {signum.name}, comfyui lives: True\ncomfyui stops\n")
        assert has_ended(int(comfyui[1]))
        assert list(waiting.tmp.iterdir()) == []

    def test_in_quick_succession_do_not_end_the_wait_for_the_worker(self, container: Container) -> None:
        container.install_handler(PATIENT_HANDLER)
        started = container.start()
        started.wait_for_line("handler waits")
        for number in range(1, 151):
            started.send_signal(signal.SIGTERM)
            started.send_signal(signal.SIGINT)
            started.wait_for_line(rf"received {number}\.")
        (container.folder / "enough").touch()
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 7

    def test_kill_a_comfyui_that_ignores_them(self, waiting: Container) -> None:
        waiting.install_comfyui(STUBBORN_COMFYUI)
        started = waiting.start()
        comfyui = started.wait_for_line(r"comfyui (\d+) ignores SIGTERM")
        started.wait_for_line("handler waits")
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 7
        assert "start.sh: ComfyUI did not end within 10 s and is killed.\n" in started.stderr
        assert has_ended(int(comfyui[1]))


class TestComfyUI:
    def test_gets_its_arguments(self, waiting: Container) -> None:
        started = waiting.start(
            COMFYUI_PORT="8299",
            COMFY_LOG_LEVEL="debug",
            COMFYUI_LISTEN="0.0.0.0",
            COMFYUI_ARGS=" --lowvram\n --listen 127.0.0.2 ",
        )
        started.wait_for_line(COMFYUI_IS_UP)
        about = report_of(started.output, "comfyui")
        assert about["cwd"] == str(waiting.comfyui)
        expected = "--listen 0.0.0.0 --port 8299 --verbose DEBUG --max-upload-size 1024 --cpu"
        expected += " --disable-metadata --lowvram --listen 127.0.0.2"
        assert about["args"] == expected.split()

    def test_writes_the_prompt_into_outputs_only_on_request(self, waiting: Container) -> None:
        started = waiting.start(KEEP_METADATA="true")
        started.wait_for_line(COMFYUI_IS_UP)
        assert "--disable-metadata" not in str(report_of(started.output, "comfyui")["args"])

    def test_runs_with_the_python_of_its_environment(self, waiting: Container) -> None:
        del waiting.env["COMFYUI_PYTHON"]
        write_program(waiting.folder / "venv/bin/python", '#!/bin/sh\necho "its own python: $*"\n')
        waiting.start().wait_for_line("its own python: main.py --listen")

    def test_is_the_only_process_with_tcmalloc(self, container: Container) -> None:
        library = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc" in line)
        container.install_command("ldconfig", f"echo '\tlibtcmalloc_minimal.so.4 (libc6,x86-64) => {library}'\n")
        _, output = container.run()
        assert '"LD_PRELOAD": null' in output
        container.install_handler(WAITING_HANDLER)
        started = container.start()
        started.wait_for_line(COMFYUI_IS_UP)
        assert report_of(started.output, "comfyui")["preload"] == library

    def test_is_restarted_with_backoff(self, waiting: Container) -> None:
        waiting.install_comfyui(DYING_COMFYUI)
        started = waiting.start()
        started.wait_for_line("comfyui start 3")
        waits = re.findall(r"start\.sh: ComfyUI ended with exit code 3 and is started again in (\d+) s", started.output)
        assert waits == ["1", "2"]
        first, second, third = (float(line) for line in (waiting.comfyui / "starts").read_text().splitlines())
        assert second - first >= 1
        assert third - second >= 2

    def test_is_restarted_under_a_new_pid_after_a_kill(self, waiting: Container) -> None:
        started = waiting.start()
        before = started.wait_for_line(COMFYUI_IS_UP)[1]
        pid_file = Path(started.wait_for_line(r"handler waits \d+ (\S+) ")[1])
        assert pid_file.read_text().strip() == before
        os.kill(int(before), signal.SIGKILL)
        started.wait_for_line("ComfyUI ended with exit code 137 and is started again in 1 s")
        after = started.wait_for_line(rf'^comfyui {{.*"pid": (?!{before}\b)(\d+)')[1]
        assert pid_file.read_text().strip() == after

    def test_has_no_pid_file_while_down(self, waiting: Container) -> None:
        waiting.install_comfyui("raise SystemExit(3)")
        started = waiting.start()
        pid_file = Path(started.wait_for_line(r"handler waits \d+ (\S+) ")[1])
        started.wait_for_line("started again in 4 s")
        assert not pid_file.exists()

    def test_is_abandoned_after_repeated_deaths(self, waiting: Container) -> None:
        waiting.install_comfyui("raise SystemExit(3)")
        started = waiting.start(COMFYUI_MAX_DEATHS="2")
        pid_file = Path(started.wait_for_line(r"handler waits \d+ (\S+) ")[1])
        started.wait_for_line("ComfyUI died 2 times in a row; it is not started again")
        assert pid_file.read_text() == "ComfyUI died 2 times in a row\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 7

    def test_makes_the_exit_code_nonzero_once_abandoned(self, waiting: Container) -> None:
        waiting.install_comfyui("raise SystemExit(3)")
        waiting.install_handler(WAITING_HANDLER.replace("sys.exit(7)", "sys.exit(0)"))
        started = waiting.start(COMFYUI_MAX_DEATHS="1")
        started.wait_for_line("handler waits")
        started.wait_for_line("it is not started again")
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 3

    @pytest.mark.parametrize(
        ("arguments", "expected"), [("", True), ("--lowvram", True), ("--output-directory elsewhere", False)]
    )
    def test_passes_its_folders_to_the_worker(self, container: Container, arguments: str, expected: bool) -> None:
        _, output = container.run(COMFYUI_ARGS=arguments)
        assert (f'"COMFYUI_BASE_DIRECTORY": "{container.comfyui}"' in output) is expected

    def test_takes_its_children_with_it(self, waiting: Container) -> None:
        waiting.install_comfyui(PARENT_COMFYUI)
        started = waiting.start()
        started.wait_for_line("handler waits")
        _, parent, child = started.wait_for_line(r"comfyui (\d+) has child (\d+)").group(0, 1, 2)
        os.kill(int(parent), signal.SIGKILL)
        next_child = started.wait_for_line(rf"comfyui (?!{parent} )\d+ has child (\d+)")[1]
        assert has_ended(int(child))
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 7
        assert has_ended(int(next_child))

    def test_is_not_restarted_once_the_worker_exits(self, waiting: Container) -> None:
        waiting.install_comfyui("raise SystemExit(3)")
        started = waiting.start()
        started.wait_for_line("handler waits")
        started.wait_for_line("started again in 2 s")
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 7
        assert list(waiting.tmp.iterdir()) == []

    def test_leaves_its_last_log_lines_in_a_small_file(self, waiting: Container) -> None:
        waiting.install_comfyui(TALKATIVE_COMFYUI)
        started = waiting.start()
        started.wait_for_line("comfyui is up again")
        log_file = Path(started.wait_for_line(r"handler waits \d+ \S+ (\S+)")[1])
        assert started.stdout.count("x") >= 40000 * 90  # all of it on stdout
        log = log_file.read_text()
        assert len(log) < 1_100_000
        assert "000039999 " in log
        assert "ComfyUI ended with exit code 1 " in log


class TestEmulator:
    def test_runs_with_the_workers_python_and_needs_no_gpu(self, waiting: Container) -> None:
        waiting.install_command("nvidia-smi", "exit 9\n")
        python = waiting.install_command(
            "python-of-the-worker",
            f'[ "$1" != -m ] || {{ echo "emulator: $*"; exec sleep 600; }}\nexec {sys.executable} "$@"\n',
        )
        started = waiting.start(
            COMFY_CPU="false", COMFY_EMULATOR="true", COMFYUI_DIR="none", COMFYUI_PORT="8299", WORKER_PYTHON=str(python)
        )
        started.wait_for_line("handler waits")
        started.wait_for_line(
            r"^emulator: -m comfy_emulator --listen 127.0.0.1 --port 8299 "
            r"--base-directory \S+/comfyui --max-\S+ 1024$"
        )


class TestComfyUIElsewhere:
    def test_is_left_alone(self, container: Container) -> None:
        code, output = container.run(COMFYUI_DIR="none", COMFYUI_URL="http://gpu.example:8188", COMFY_CPU="false")
        assert code == 0
        assert report_of(output, "handler")["env"] == {
            "COMFYUI_URL": "http://gpu.example:8188",
            "COMFYUI_PID_FILE": None,
            "COMFYUI_LOG_FILE": None,
            "COMFYUI_BASE_DIRECTORY": None,
            "LD_PRELOAD": None,
        }

    def test_is_reported_as_unused_when_one_is_started_locally(self, container: Container) -> None:
        _, output = container.run(COMFYUI_URL="http://gpu.example:8188")
        assert "COMFYUI_URL=http://gpu.example:8188 is not used" in output
