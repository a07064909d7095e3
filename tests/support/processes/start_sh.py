"""The folders and the environment that start.sh is run in, with stand-ins for ComfyUI and for the worker."""

from __future__ import annotations

import sys
from os import environ
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.processes.process import Process

START = ROOT / "start.sh"

# The programs write each line at once, and not by print: what one prints must neither be torn apart by what another
# prints, nor by a signal that comes while it is being printed.

# Tells what it was started with and waits for SIGTERM.
COMFYUI = """
import json, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
about = {"args": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), "preload": os.environ.get("LD_PRELOAD")}
os.write(1, f"comfyui {json.dumps(about)}\\n".encode())
signal.sigwait({signal.SIGTERM})
os.write(1, b"comfyui stops\\n")
"""

# Dies at its first two starts and stays at the third.
DYING_COMFYUI = """
import os, pathlib, signal, sys, time
starts = pathlib.Path("starts")
starts.open("a").write(f"{time.monotonic()}\\n")
count = len(starts.read_text().splitlines())
os.write(1, f"comfyui start {count}\\n".encode())
if count < 3:
    sys.exit(3)
signal.pause()
"""

STUBBORN_COMFYUI = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, f"comfyui {os.getpid()} ignores SIGTERM\\n".encode())
while True:
    signal.pause()
"""

# A custom node's helper process outlives ComfyUI, and does not listen to SIGTERM either.
PARENT_COMFYUI = """
import os, signal, subprocess
child = subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; sleep 600; :"], stdout=subprocess.PIPE)
child.stdout.readline()
os.write(1, f"comfyui {os.getpid()} has child {child.pid}\\n".encode())
signal.pause()
"""

# Says more than is kept, then dies; says little the second time.
TALKATIVE_COMFYUI = """
import os, pathlib, signal, sys
if not pathlib.Path("spoken").exists():
    pathlib.Path("spoken").touch()
    for number in range(40000):
        os.write(1, f"{number:09d} {'x' * 90}\\n".encode())
    sys.exit(1)
os.write(1, b"comfyui is up again\\n")
signal.pause()
"""

# Tells what it was given and ends with code HANDLER_EXIT.
HANDLER = """
import json, os, sys
names = ("COMFYUI_URL", "COMFYUI_PID_FILE", "COMFYUI_LOG_FILE", "COMFYUI_BASE_DIRECTORY", "LD_PRELOAD")
about = {"args": sys.argv[1:], "cwd": os.getcwd(), "env": {name: os.environ.get(name) for name in names}}
os.write(1, f"handler {json.dumps(about)}\\n".encode())
sys.exit(int(os.environ.get("HANDLER_EXIT", "0")))
"""

# Waits for a signal, tells which one and whether ComfyUI still lives, and ends with code 7.
WAITING_HANDLER = """
import os, pathlib, signal, sys

def comfyui_lives():
    try:
        os.kill(int(pathlib.Path(os.environ["COMFYUI_PID_FILE"]).read_text()), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    return True

stops = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
about = f"{os.getpid()} {os.environ['COMFYUI_PID_FILE']} {os.environ['COMFYUI_LOG_FILE']}"
os.write(1, f"handler waits {about}\\n".encode())
signum = signal.sigwait(stops)
os.write(1, f"handler got {signum.name}, comfyui lives: {comfyui_lives()}\\n".encode())
sys.exit(7)
"""

# Says how many signals it has received, and ends with code 7 at the next one when it has received enough.
PATIENT_HANDLER = """
import itertools, os, pathlib, signal, sys

stops = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
os.write(1, b"handler waits\\n")
for number in itertools.count(1):
    signal.sigwait(stops)
    os.write(1, f"received {number}.\\n".encode())
    if pathlib.Path(__file__).with_name("enough").exists():
        break
sys.exit(7)
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Container:
    """The folders and the environment that start.sh is run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.comfyui = folder / "ComfyUI"
        self.bin = folder / "bin"
        self.tmp = folder / "tmp"
        self.tmp.mkdir()
        self.bin.mkdir()
        self.script = START
        self.started: list[Process] = []
        self.env = {
            "PATH": f"{self.bin}:{environ['PATH']}",
            "TMPDIR": str(self.tmp),
            "COMFY_CPU": "true",
            "COMFYUI_DIR": str(self.comfyui),
            "COMFYUI_PYTHON": sys.executable,
            "WORKER_PYTHON": sys.executable,
            "WORKER_HANDLER": str(folder / "handler.py"),
        }
        self.install_comfyui(COMFYUI)
        self.install_handler(HANDLER)

    def install_comfyui(self, text: str) -> None:
        write_program(self.comfyui / "main.py", text)

    def install_handler(self, text: str) -> None:
        write_program(self.folder / "handler.py", text)

    def install_command(self, name: str, text: str) -> Path:
        return write_program(self.bin / name, "#!/bin/sh\n" + text)

    def start(self, *args: str, **env: str) -> Process:
        # A test runner in the background may itself ignore SIGINT, which children inherit.
        command = ["env", "--default-signal=INT", str(self.script), *args]
        started = Process(command, environment=self.env | env, cwd=self.folder)
        self.started.append(started)
        return started

    def run(self, *args: str, **env: str) -> tuple[int, str]:
        """What it ended with and what it said."""
        started = self.start(*args, **env)
        return started.wait(), started.output
