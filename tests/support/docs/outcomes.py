"""Everything that can become of a prompt and of the websocket, and what a job then has to end with: one table.

docs/reference/outcomes.md is this table as a page; it is written by

    python -m tests.support.docs.outcomes > docs/reference/outcomes.md
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from comfy_worker.settings import Settings, load_settings
from comfy_worker.types import PromptsAhead, Stage, StageStarted
from comfy_worker.worker import Worker
from tests.support.comfyui.controllable import ControllableComfyUI
from tests.support.comfyui.gate_node import Gate, job
from tests.support.running_job import RunningJob

BOOT_S = 120.0
"""How long a real ComfyUI may take to start."""
HURRIED_S = 0.25
"""Between two questions without a websocket."""
NOWHERE_S = 1.0
"""How long a prompt may be in neither queue nor history."""
DEAD_S = 1.0
"""How long nothing may listen, and the questions that find it out."""


@dataclass(frozen=True)
class Socket:
    """A state of the websocket.

    Attributes:
        before: brings it about before the job starts.
        during: brings it about when the prompt runs or waits.
        hears: whether events come.
        hears_start: whether the first ones did.
        is_open: whether the worker believes that they could come.
    """

    name: str
    meaning: str
    before: Callable[[ControllableComfyUI], None] = lambda _victim: None
    during: Callable[[ControllableComfyUI], None] = lambda _victim: None
    hears: bool = False
    hears_start: bool = False
    is_open: bool = False

    def interval_s(self, settings: Settings) -> float:
        """Return the seconds between two questions to history and queue."""
        poll_s = settings.comfyui_poll_interval_s
        return poll_s if self.is_open else min(poll_s, HURRIED_S)


def lose(victim: ControllableComfyUI) -> None:
    victim.refuse_websockets()
    victim.cut_websockets()


SOCKETS = (
    Socket("fine", "every event arrives", hears=True, hears_start=True, is_open=True),
    Socket(
        "lost", "closed while the prompt runs or waits; every attempt to reconnect fails", during=lose, hears_start=True
    ),
    Socket("silent", "open, but no event arrives", before=lambda victim: victim.silence_websockets(), is_open=True),
    Socket("never opened", "refused from the start", before=lambda victim: victim.refuse_websockets()),
)


@dataclass
class RunningScenario:
    """A job on its way, and what it meets."""

    victim: ControllableComfyUI
    gate: Gate
    job: RunningJob
    prompt_id: str


class Afterwards(Enum):
    """Where the prompt is when the job has ended."""

    OUT = "removed"
    DIED_TOO = "lost with ComfyUI"
    STILL_IN = "still in ComfyUI, which accepts no request"


@dataclass(frozen=True)
class Ending:
    """What becomes of a prompt, and what the job has to make of it.

    Attributes:
        act: brings it about.
        known_after: seconds from the event to the job's end, and how that is said in words.
        result: what the job ends with, in words.
        code: of the failure; None where the job succeeds.
        from_queue: it happens while the prompt waits behind another; else while it runs.
        runs: how often the workflow's node begins, all in all.
        prompt: where the prompt is afterwards.
        needs_process: whether ComfyUI's process has to be killed or frozen for it.
        settings: shrunk for it.
    """

    name: str
    act: Callable[[RunningScenario], None]
    known_after: Callable[[Socket, Settings], float]
    result: str
    code: str | None = None
    from_queue: bool = False
    runs: int = 1
    prompt: Afterwards = Afterwards.OUT
    needs_process: bool = True
    settings: tuple[tuple[str, Any], ...] = ()


def when_notified(socket: Socket, settings: Settings) -> float:
    return 0.0 if socket.hears else socket.interval_s(settings)


def when_nowhere(socket: Socket, settings: Settings) -> float:
    return socket.interval_s(settings) + NOWHERE_S


def when_dead(_socket: Socket, _settings: Settings) -> float:
    return DEAD_S


def when_still_dead(_socket: Socket, settings: Settings) -> float:
    return DEAD_S + settings.ready_timeout_s


def when_given_up(socket: Socket, settings: Settings) -> float:
    return socket.interval_s(settings) + settings.comfyui_lost_after_s


def die_and_return(scene: RunningScenario) -> None:
    scene.victim.kill()
    scene.job.wait_for_notice("submitted again")
    scene.gate.open()
    scene.victim.start()


def restart(scene: RunningScenario) -> None:
    scene.victim.kill()
    scene.victim.start()


ENDINGS = (
    Ending("it succeeds", lambda scene: scene.gate.open(), when_notified, "success", needs_process=False),
    Ending(
        "a node fails",
        lambda scene: scene.gate.open("nothing there"),
        when_notified,
        "failure with the node and its message",
        code="execution_failed",
        needs_process=False,
    ),
    Ending(
        "somebody interrupts it",
        lambda scene: scene.victim.interrupt(),
        when_notified,
        "failure",
        code="cancelled",
        needs_process=False,
    ),
    Ending(
        "somebody deletes it while it waits",
        lambda scene: scene.victim.delete(scene.prompt_id),
        when_nowhere,
        "failure",
        code="cancelled",
        from_queue=True,
        runs=0,
        needs_process=False,
    ),
    Ending(
        "ComfyUI restarts before it began",
        die_and_return,
        when_dead,
        "success: the prompt is submitted again",
        from_queue=True,
    ),
    Ending(
        "ComfyUI restarts after it began",
        restart,
        when_dead,
        "failure; with `retry_on_crash`, the workflow runs once more",
        code="comfyui_crashed",
    ),
    Ending(
        "ComfyUI dies before it began, and stays dead",
        lambda scene: scene.victim.kill(),
        when_still_dead,
        "failure",
        code="comfyui_unreachable",
        from_queue=True,
        runs=0,
        prompt=Afterwards.DIED_TOO,
        settings=(("comfyui_ready_timeout_s", 0.2),),
    ),
    Ending(
        "ComfyUI dies after it began, and stays dead",
        lambda scene: scene.victim.kill(),
        when_dead,
        "failure",
        code="comfyui_crashed",
        prompt=Afterwards.DIED_TOO,
    ),
    Ending(
        "ComfyUI hangs",
        lambda scene: scene.victim.hang(),
        when_given_up,
        "failure; if start.sh runs ComfyUI, it is killed and restarted",
        code="comfyui_unreachable",
        prompt=Afterwards.STILL_IN,
        settings=(("comfyui_request_timeout_s", 0.7), ("comfyui_lost_after_s", 0.5)),
    ),
)


def name_of(value: Socket | Ending) -> str:
    return value.name


# --------------------------------------------------------------------------------------------- playing a row


def shrunk(url: str, **more: Any) -> Settings:
    """Return settings with which nothing takes long; an answer may."""
    small: dict[str, Any] = {
        "comfyui_url": url,
        "comfyui_poll_interval_s": 0.2,
        "websocket_reconnect_attempts": 2,
        "websocket_reconnect_delay_s": 0.05,
        "comfyui_ready_timeout_s": BOOT_S,
    }
    return load_settings(**{**small, **more})


def play(victim: ControllableComfyUI, socket: Socket, ending: Ending, folder: Path, slack_s: float) -> None:
    """Run a job into a row of the table, and check what comes of it."""
    settings = shrunk(victim.url, **dict(ending.settings))
    socket.before(victim)
    blocker, gate = Gate(folder), Gate(folder)
    others = {victim.submit(blocker.graph())} if ending.from_queue else set()
    blocker.wait_until_run(len(others))
    with closing(Worker(settings)) as worker:
        running = RunningJob(worker, job(gate.graph()))
        if ending.from_queue:
            running.wait_for(lambda event: event == PromptsAhead(1))
        else:
            wait_until_it_runs(running, gate, socket)
        [prompt_id] = victim.pending() if ending.from_queue else victim.running()
        socket.during(victim)
        began = time.monotonic()
        ending.act(RunningScenario(victim, gate, running, prompt_id))
        output = running.output()
    assert running.ended_at is not None
    assert running.ended_at - began <= ending.known_after(socket, settings) + slack_s
    check_result(ending, output)
    assert gate.runs == ending.runs
    check_queue(victim, ending, prompt_id, others)


def wait_until_it_runs(running: RunningJob, gate: Gate, socket: Socket) -> None:
    gate.wait_until_run()
    if socket.hears_start:
        running.wait_for(lambda event: event == StageStarted(Stage.RUNNING))


def check_result(ending: Ending, output: dict[str, Any]) -> None:
    assert output.get("code") == ending.code, output
    if ending.code is None:
        [image] = output["images"]
        assert image["filename"] == "ComfyUI_00001_.png"
    if ending.code == "execution_failed":
        assert output["error"] == ("Workflow execution error: Node Type: TestGate, Node ID: 3, Message: nothing there")


def check_queue(victim: ControllableComfyUI, ending: Ending, prompt_id: str, others: set[str]) -> None:
    if ending.prompt is Afterwards.STILL_IN:
        victim.wake()
        assert victim.running() == [prompt_id]
    elif ending.prompt is Afterwards.OUT:
        assert set(victim.running() + victim.pending()) <= others


# ------------------------------------------------------------------------------------------------- the page


_OPENING = """\
# How a job ends

ComfyUI's history and queue decide how a job ends. The websocket only makes it faster: the result in each row is the
same in every state of the websocket. `tests/integration/test_outcomes.py` tests each pair on the emulator and, if one
is available, on a real ComfyUI; it also keeps this page up to date.
"""
_HOW_SOON = """\
## Partial outputs

A job that fails in ComfyUI returns what its nodes had saved, sent or reported until then: `images`, `videos`, `texts`,
…, and `partial: true` next to `error` and `code`. This holds for every API, for webhooks and for local runs. It also
holds for a job that was interrupted or timed out, and for one whose ComfyUI died, if the files can be reached.

Delivery of these outputs may take 30 s. A file that is not delivered becomes a sentence in `errors`, and never changes
the reason of the failure. A job that its caller cancelled returns no outputs. If a workflow ran twice, the last files
of each node count.

## Time until the end

Seconds from the event to the end of the job, with default settings. The time that a node takes to react to an interrupt
and that ComfyUI takes to respond is added.
"""
_CLOSING = """\
`COMFYUI_POLL_INTERVAL_S`, `COMFYUI_LOST_AFTER_S` and `COMFYUI_READY_TIMEOUT_S` change these times
([configuration.md](configuration.md)). The worker reopens a websocket `WEBSOCKET_RECONNECT_ATTEMPTS` times; after that,
it only polls. The loss of the websocket alone never fails a job. Only images of SaveImageWebsocket, which are sent over
the websocket and stored nowhere, are lost with it; the output says so.
"""


def page() -> str:
    """Return docs/reference/outcomes.md."""
    settings = Settings.model_construct()
    results = table(
        ["what happens to the prompt", "the job ends with", "`code`", "the prompt afterwards"],
        [[e.name, e.result, f"`{e.code}`" if e.code else "", e.prompt.value] for e in ENDINGS],
    )
    times = table(
        ["what happens to the prompt", *(f"websocket {socket.name}" for socket in SOCKETS)],
        [[e.name, *(seconds(e.known_after(socket, settings)) for socket in SOCKETS)] for e in ENDINGS],
    )
    sockets = "".join(f"- **{socket.name}**: {socket.meaning}.\n" for socket in SOCKETS)
    return "\n".join((_OPENING, results, _HOW_SOON, times, sockets, _CLOSING))


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def seconds(value: float) -> str:
    return f"{value:g}" if value else "at once"


if __name__ == "__main__":
    print(page(), end="")
