"""A job always ends, whatever becomes of its prompt and of the websocket: one table, on the emulator and on ComfyUI.

The table is in `tests/support/docs/outcomes.py`. Its rows also run against a real ComfyUI that COMFYUI_REAL_COMMAND
starts (a shell command with {port} and {base}), or, as far as it need not be killed, against one at COMFYUI_URL with
`tests/data/gate_node.py` in its `custom_nodes/`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from comfy_worker.settings import load_settings
from comfy_worker.types import JobEvent, NodeStarted
from comfy_worker.worker import Worker
from tests.support.comfyui.controllable import EmulatedComfyUI, RealComfyUI, proxy_to
from tests.support.comfyui.gate_node import Gate, job
from tests.support.comfyui.websocket_proxy import Websockets
from tests.support.docs.outcomes import (
    BOOT_S,
    ENDINGS,
    SOCKETS,
    Ending,
    Socket,
    lose,
    name_of,
    page,
    play,
    shrunk,
    wait_until_it_runs,
)
from tests.support.paths import ROOT
from tests.support.running_job import RunningJob
from tests.support.waiting import wait_until

REAL_COMMAND, REAL_URL = os.environ.get("COMFYUI_REAL_COMMAND"), os.environ.get("COMFYUI_URL")
PAGE = ROOT / "docs/reference/outcomes.md"

SLACK_S = 15.0
"""What a busy machine may add to the time that an end needs: a safety net, no assertion on speed."""


@pytest.fixture(autouse=True)
def only_own_settings(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


@pytest.mark.parametrize("ending", ENDINGS, ids=name_of)
@pytest.mark.parametrize("socket", SOCKETS, ids=name_of)
def test_a_job_ends(socket: Socket, ending: Ending, tmp_path: Path) -> None:
    with EmulatedComfyUI() as victim:
        play(victim, socket, ending, tmp_path, SLACK_S)


# ------------------------------------------------------------------------------------------- a real ComfyUI


@pytest.fixture(scope="module")
def running_comfyui() -> Iterator[RealComfyUI]:
    with RealComfyUI(REAL_COMMAND, REAL_URL) as victim:
        if not victim.has_gate:
            pytest.skip("the ComfyUI at COMFYUI_URL lacks tests/data/gate_node.py in its custom_nodes/")
        yield victim


@pytest.fixture
def real(running_comfyui: RealComfyUI) -> Iterator[RealComfyUI]:
    """Return a real ComfyUI that lives, is idle and has no quarrel with anyone's websocket."""
    yield running_comfyui
    running_comfyui.recover()


@pytest.mark.real
@pytest.mark.skipif(not (REAL_COMMAND or REAL_URL), reason="neither COMFYUI_REAL_COMMAND nor COMFYUI_URL is set")
@pytest.mark.parametrize("socket", SOCKETS, ids=name_of)
@pytest.mark.parametrize("ending", ENDINGS, ids=name_of)
def test_a_job_ends_on_a_real_comfyui(socket: Socket, ending: Ending, real: RealComfyUI, tmp_path: Path) -> None:
    if ending.needs_process and not real.can_be_killed:
        pytest.skip("COMFYUI_REAL_COMMAND is not set: the ComfyUI at COMFYUI_URL is not ours to kill")
    play(real, socket, ending, tmp_path, SLACK_S + (BOOT_S if ending.needs_process else 0))


# ------------------------------------------------------------------------------------- death, at the defaults


@pytest.mark.parametrize("socket", SOCKETS, ids=name_of)
def test_death_is_noticed_within_two_seconds(socket: Socket, tmp_path: Path) -> None:
    with EmulatedComfyUI() as victim, closing(Worker(load_settings(comfyui_url=victim.url))) as worker:
        socket.before(victim)
        gate = Gate(tmp_path)
        running = RunningJob(worker, job(gate.graph()))
        wait_until_it_runs(running, gate, socket)
        socket.during(victim)
        died_at = time.monotonic()
        victim.kill()
        assert running.output()["code"] == "comfyui_crashed"
    assert running.ended_at is not None
    assert running.ended_at - died_at < 2


# ------------------------------------------------------------------------------------------- the websocket


def test_a_reconnected_websocket_delivers_the_rest(tmp_path: Path) -> None:
    first, second = Gate(tmp_path), Gate(tmp_path)
    graph = first.graph()
    graph["5"] = second.graph()["3"]
    graph["5"]["inputs"]["image"] = ["3", 0]
    graph["9"]["inputs"]["images"] = ["5", 0]
    patient = {"comfyui_poll_interval_s": 600, "websocket_reconnect_attempts": 10_000}
    with EmulatedComfyUI() as victim, closing(Worker(shrunk(victim.url, **patient))) as worker:
        running = RunningJob(worker, job(graph))
        running.wait_for(started("3"))
        clients = victim.server.clients
        # ComfyUI forgets a client when it sees that its old websocket is closed, even if a new one is open.
        victim.server.faults.websocket = "refuse"
        victim.cut_websockets()
        wait_until(lambda: not victim.server.clients)
        victim.server.faults.websocket = "accept"
        wait_until(lambda: victim.server.clients == clients)
        first.open()
        running.wait_for(started("5"))
        second.open()
        assert "error" not in running.output()


def started(node_id: str) -> Callable[[JobEvent], bool]:
    return lambda event: isinstance(event, NodeStarted) and event.node_id == node_id


@pytest.mark.parametrize("event", ["execution_start", "executing", "executed", "execution_success", "progress_state"])
def test_a_websocket_cut_at_any_event_fails_no_job(event: str, tmp_path: Path) -> None:
    with EmulatedComfyUI() as victim, closing(Worker(shrunk(victim.url, comfyui_poll_interval_s=600))) as worker:
        victim.server.faults.drop_websocket_at_event = event
        victim.server.faults.drop_websocket_times = 1
        gate = Gate(tmp_path)
        gate.open()
        assert "error" not in RunningJob(worker, job(gate.graph())).output()
        # The next job is none the worse for it.
        assert "error" not in RunningJob(worker, job(gate.graph())).output()


@pytest.mark.parametrize(
    ("attempts", "delay_s", "made"), [(0, 0.0, 0), (2, 0.0, 2), (5, 600.0, 1)], ids=["none", "used up", "far apart"]
)
def test_polling_continues_without_reconnection_attempts(
    attempts: int, delay_s: float, made: int, tmp_path: Path
) -> None:
    with EmulatedComfyUI() as victim, proxy_to(victim) as proxy:
        settings = shrunk(proxy.url, websocket_reconnect_attempts=attempts, websocket_reconnect_delay_s=delay_s)
        with closing(Worker(settings)) as worker:
            gate = Gate(tmp_path)
            running = RunningJob(worker, job(gate.graph()))
            gate.wait_until_run()
            proxy.websockets = Websockets.REFUSED
            proxy.cut_websockets()
            wait_until(lambda: proxy.refused >= made)
            gate.open()
            assert "error" not in running.output()
        assert proxy.refused == made


def test_a_lost_websocket_is_not_a_stalled_workflow(tmp_path: Path) -> None:
    stall_s = 0.5
    with EmulatedComfyUI() as victim, closing(Worker(shrunk(victim.url, comfyui_stall_timeout_s=stall_s))) as worker:
        gate = Gate(tmp_path)
        running = RunningJob(worker, job(gate.graph()))
        gate.wait_until_run()
        lose(victim)
        # It is time itself that must not end the job.
        with pytest.raises(AssertionError, match="has not ended"):
            running.output(timeout_s=3 * stall_s)
        gate.open()
        assert "error" not in running.output()


def test_a_hanging_handshake_does_not_delay_a_job_for_long(tmp_path: Path) -> None:
    with EmulatedComfyUI() as victim:
        victim.server.faults.websocket = "hang"
        with closing(Worker(shrunk(victim.url, comfyui_request_timeout_s=1))) as worker:
            gate = Gate(tmp_path)
            gate.open()
            assert "error" not in RunningJob(worker, job(gate.graph())).output(SLACK_S)


def test_an_invalid_websocket_is_abandoned_but_not_the_job(tmp_path: Path) -> None:
    with (
        EmulatedComfyUI() as victim,
        proxy_to(victim) as proxy,
        closing(Worker(shrunk(proxy.url, comfyui_poll_interval_s=600))) as worker,
    ):
        gate = Gate(tmp_path)
        running = RunningJob(worker, job(gate.graph()))
        running.wait_for(started("3"))
        proxy.say("no JSON")
        gate.open()
        assert "error" not in running.output()


# ------------------------------------------------------------------------------------------------- the page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
