"""A ComfyUI that a test may do anything to: the emulator in this process, or a real one behind a proxy."""

from __future__ import annotations

import os
import shlex
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copy
from typing import Any
from urllib.parse import urlsplit

import requests

from comfy_emulator import EmulatorServer
from tests.support.comfyui import gate_node
from tests.support.comfyui.websocket_proxy import Proxy, Websockets
from tests.support.network.ports import free_port
from tests.support.paths import DATA
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

_BOOT_TIMEOUT_S = 180.0
_NODES = DATA / "gate_node.py"


class ControllableComfyUI(ABC):
    """A ComfyUI as the worker meets it at `url`, and as everybody else meets it at `own_url`."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the worker finds it."""

    @property
    @abstractmethod
    def own_url(self) -> str:
        """Where the test itself asks, whatever is done to the worker's connections."""

    # ------------------------------------------------------------------------------------------- mishaps

    @abstractmethod
    def refuse_websockets(self) -> None:
        """Let no websocket open from now on."""

    @abstractmethod
    def silence_websockets(self) -> None:
        """Let websockets open and say nothing from now on."""

    @abstractmethod
    def cut_websockets(self) -> None:
        """Cut the open websockets without a word."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once; nothing listens at its port afterwards."""

    @abstractmethod
    def start(self) -> None:
        """Have it back at the same port after `kill`, without queue and history."""

    @abstractmethod
    def hang(self) -> None:
        """Freeze it: connections are taken, nothing is answered."""

    @abstractmethod
    def wake(self) -> None:
        """Let it go on after `hang`."""

    # ----------------------------------------------------------------------------------------- bystanders

    def submit(self, graph: dict[str, Any]) -> str:
        """Queue somebody else's prompt; return its id."""
        prompt_id: str = self._ask("POST", "/prompt", {"prompt": graph}).json()["prompt_id"]
        return prompt_id

    def interrupt(self) -> None:
        """Interrupt whatever runs, as somebody in ComfyUI's own page does."""
        self._ask("POST", "/interrupt", {})

    def delete(self, prompt_id: str) -> None:
        """Take a prompt out of the queue that waits there."""
        self._ask("POST", "/queue", {"delete": [prompt_id]})

    def running(self) -> list[str]:
        """Return the ids of the prompts that run: one at most."""
        return [item[1] for item in self._ask("GET", "/queue").json()["queue_running"]]

    def pending(self) -> list[str]:
        """Return the ids of the prompts that wait."""
        return [item[1] for item in self._ask("GET", "/queue").json()["queue_pending"]]

    def finished(self) -> list[str]:
        """Return the ids of the prompts that have ended, oldest first."""
        return list(self._ask("GET", "/history").json())

    def succeeded(self, prompt_id: str) -> bool:
        """Return whether a prompt has ended well."""
        entry = self._ask("GET", f"/history/{prompt_id}").json().get(prompt_id)
        return entry is not None and entry["status"]["status_str"] == "success"

    def wait_until_idle(self) -> None:
        """Return when no prompt runs or waits."""
        wait_until(lambda: not self.running() and not self.pending())

    def clear(self) -> None:
        """Take every prompt out."""

        def is_idle() -> bool:
            if not self.running():
                return True
            self.interrupt()
            return False

        self._ask("POST", "/queue", {"clear": True})
        wait_until(is_idle)

    def _ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        response = requests.request(method, f"{self.own_url}{path}", json=body, timeout=TIMEOUT_S)
        response.raise_for_status()
        return response


class EmulatedComfyUI(ControllableComfyUI):
    """The emulator in this process, with the gate among its nodes; `server.faults` has more to go wrong."""

    def __init__(self, **server: Any) -> None:
        self.server = EmulatorServer(
            **{"registry": gate_node.registry(), "object_info": gate_node.OBJECT_INFO, **server},
        )

    def __enter__(self) -> EmulatedComfyUI:
        self.server.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.server.stop()

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def own_url(self) -> str:
        return self.server.url

    def refuse_websockets(self) -> None:
        self.server.faults.websocket = "refuse"

    def silence_websockets(self) -> None:
        self.server.faults.silent = True

    def cut_websockets(self) -> None:
        self.server.drop_websockets()

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()

    def hang(self) -> None:
        self.server.faults.hang = True

    def wake(self) -> None:
        self.server.faults.hang = False


@contextmanager
def proxy_to(victim: EmulatedComfyUI) -> Iterator[Proxy]:
    """Put a proxy in front of an emulator until the end of the block."""
    proxy = Proxy("127.0.0.1", victim.server.port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


class RealComfyUI(ControllableComfyUI):
    """A real ComfyUI behind a proxy.

    Args:
        command: starts it in the foreground; `{port}` and `{base}` stand for its port and its base directory, into
            whose `custom_nodes/` the gate was put. None for one that runs already and is not to be ended.
        url: of one that runs already.
    """

    def __init__(self, command: str | None, url: str | None) -> None:
        self._command = command
        self._process: Process | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        parts = urlsplit(url or f"http://127.0.0.1:{free_port()}")
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._proxy = Proxy(self._host, self._port)

    def __enter__(self) -> RealComfyUI:
        if self._command is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
            nodes = Path(self._folder.name, "custom_nodes")
            nodes.mkdir()
            copy(_NODES, nodes)
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._proxy.stop()
        if self._process is not None:
            self._process.kill()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def has_gate(self) -> bool:
        """Whether the gate is among its nodes."""
        return "TestGate" in self._ask("GET", "/object_info/TestGate").json()

    @property
    def can_be_killed(self) -> bool:
        """Whether its process is ours."""
        return self._command is not None

    @property
    def url(self) -> str:
        return self._proxy.url

    @property
    def own_url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def refuse_websockets(self) -> None:
        self._proxy.websockets = Websockets.REFUSED

    def silence_websockets(self) -> None:
        self._proxy.websockets = Websockets.SILENCED

    def recover(self) -> None:
        """Bring it back from whatever was done to it."""
        self._proxy.websockets = Websockets.PASSED
        if self._process is not None:
            self.wake()
        elif self.can_be_killed:
            self.start()
        self.clear()

    def cut_websockets(self) -> None:
        self._proxy.cut_websockets()

    def kill(self) -> None:
        assert self._process is not None
        self._proxy.stop()
        self._process.kill()
        self._process = None

    def start(self) -> None:
        if self._command is not None and self._process is None:
            assert self._folder is not None
            command = self._command.format(port=self._port, base=shlex.quote(self._folder.name))
            self._process = Process(["bash", "-c", f"exec {command}"])
            wait_until(self._answers, _BOOT_TIMEOUT_S)
        self._proxy.start()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.own_url}/prompt", timeout=TIMEOUT_S).ok
        except requests.ConnectionError:
            return False

    def hang(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)
