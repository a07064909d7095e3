"""The kinds of faults of a soak test: their random details, and the errors that they may cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from benchmarks.soak.faults import (
    BadPlatformResponse,
    Death,
    DeathAtEvent,
    EmulatorFault,
    Fault,
    Freeze,
    Hang,
    Interrupt,
    PlatformDown,
)
from benchmarks.soak.shapes import INPUT_IMAGE, WEBSOCKET_PICTURE, Shape, cancel_running
from tests.support.runpod.platform_http import PlatformFault

REQUEST_TIMEOUT_S = 1.5
"""How long the worker waits for a response of ComfyUI."""

FaultFactory = Callable[[Random], Fault]
_PICTURE = "preview"
"""The emulator's name for binary messages with an image."""
_EVENTS = (
    "status",
    "execution_start",
    "execution_cached",
    "executing",
    "progress",
    "progress_state",
    "executed",
    "execution_success",
    _PICTURE,
)
_CRASHED = frozenset({"comfyui_crashed"})
_HUNG = frozenset({"comfyui_unreachable", "comfyui_crashed", "upload_failed"})
_CANCELLED = frozenset({"cancelled"})
_UNREACHABLE = frozenset({"comfyui_unreachable"})

_REQUESTS: Mapping[str, tuple[str, str, Shape | None]] = {
    "POST /prompt": ("POST", "/prompt", None),
    "GET /history": ("GET", "/history/*", None),
    "GET /view": ("GET", "/view", None),
    "POST /upload": ("POST", "/upload/image", INPUT_IMAGE),
    "GET /queue": ("GET", "/queue", cancel_running),
    "POST /interrupt": ("POST", "/interrupt", cancel_running),
}
"""The worker's requests: method, path, and a shape of job that certainly makes the request."""


def _soon(rng: Random) -> float:
    return round(rng.uniform(0.0, 0.1), 3)


def _event(rng: Random) -> tuple[str, Shape | None]:
    """Return an event, and the shape of job that it needs."""
    event = rng.choice(_EVENTS)
    return event, WEBSOCKET_PICTURE if event == _PICTURE else None


# -------------------------------------------------------------------------------------------- the websocket


def _websocket_cut(rng: Random) -> Fault:
    return EmulatorFault(name="websocket cut", cut_first=True, about_websocket=True, delay_s=_soon(rng))


def _websocket_cut_at_event(rng: Random) -> Fault:
    event, needs = _event(rng)
    fields = {"drop_websocket_at_event": event, "drop_websocket_times": rng.randint(1, 2)}
    return EmulatorFault(name="websocket cut at an event", fields=fields, about_websocket=True, needs=needs)


def _websocket_cut_often(rng: Random) -> Fault:
    fields = {"drop_websocket_after": rng.randint(0, 6), "drop_websocket_times": rng.randint(2, 8)}
    return EmulatorFault(name="websocket cut again and again", fields=fields, cut_first=True, about_websocket=True)


def _websocket_refused(rng: Random) -> Fault:
    delay_s = rng.choice((None, _soon(rng)))
    fields = {"websocket": "refuse"}
    return EmulatorFault(name="websocket refused", fields=fields, cut_first=True, about_websocket=True, delay_s=delay_s)


def _websocket_hanging(rng: Random) -> Fault:
    delay_s = rng.choice((None, _soon(rng)))
    fields = {"websocket": "hang"}
    return EmulatorFault(name="websocket hanging", fields=fields, cut_first=True, about_websocket=True, delay_s=delay_s)


def _websocket_silent(rng: Random) -> Fault:
    return EmulatorFault(
        name="websocket silent", fields={"silent": True}, about_websocket=True, delay_s=rng.choice((None, 0.05))
    )


def _websocket_silent_from_event(rng: Random) -> Fault:
    event, needs = _event(rng)
    fields = {"silent_from_event": event, "silent": False}
    return EmulatorFault(name="websocket silent from an event on", fields=fields, about_websocket=True, needs=needs)


# ---------------------------------------------------------------------------------------- history and queue


def _history_late(rng: Random) -> Fault:
    return EmulatorFault(name="history late", fields={"history_delay_s": round(rng.uniform(0.1, 2.0), 3)})


def _history_lost(_rng: Random) -> Fault:
    return EmulatorFault(name="history lost", fields={"history_lost": True})


def _prompt_deleted(_rng: Random) -> Fault:
    return EmulatorFault(name="prompt deleted while pending", fields={"delete_pending": 1}, codes=_CANCELLED)


def _interrupted(rng: Random) -> Fault:
    return Interrupt(name="interrupted by somebody", codes=_CANCELLED, delay_s=_soon(rng))


def _interrupt_ignored(rng: Random) -> Fault:
    fields = {"ignore_interrupts": rng.randint(1, 3)}
    return EmulatorFault(name="interrupt without effect", fields=fields, needs=cancel_running)


# ------------------------------------------------------------------------------------------------- requests


def _request(name: str, **details: Any) -> dict[str, Any]:
    method, path, _ = _REQUESTS[name]
    return {"method": method, "path": path, **details}


def _answers_500(request: str, codes: frozenset[str] = frozenset(), times: tuple[int, int] = (1, 1)) -> FaultFactory:
    def draw(rng: Random) -> Fault:
        rule = _request(request, status=500, times=rng.randint(*times))
        name = f"{request} answered 500"
        return EmulatorFault(name=name, fields={"answer_status": [rule]}, codes=codes, needs=_REQUESTS[request][2])

    return draw


def _view_broken(rng: Random) -> Fault:
    fields = {"answer_status": [_request("GET /view", status=500, times=rng.randint(3, 6))]}
    return EmulatorFault(name="GET /view answered 500 often", fields=fields, codes=_UNREACHABLE, lacks_files=True)


def _slow_answers(rng: Random) -> Fault:
    request = rng.choice(list(_REQUESTS))
    rule = _request(request, seconds=round(rng.uniform(0.2, 1.0), 3), times=rng.randint(1, 3))
    return EmulatorFault(name="answers slow", fields={"slow_answers": [rule]}, needs=_REQUESTS[request][2])


def _answer_too_slow(request: str) -> FaultFactory:
    def draw(rng: Random) -> Fault:
        rule = _request(request, seconds=REQUEST_TIMEOUT_S + round(rng.uniform(0.2, 1.0), 3), times=1)
        name = f"{request} answered after the timeout"
        return EmulatorFault(name=name, fields={"slow_answers": [rule]}, needs=_REQUESTS[request][2])

    return draw


def _answer_lost(request: str) -> FaultFactory:
    def draw(_rng: Random) -> Fault:
        fields = {"lost_answers": [_request(request, times=1)]}
        return EmulatorFault(name=f"answer to {request} lost", fields=fields, needs=_REQUESTS[request][2])

    return draw


# -------------------------------------------------------------------------------------------------- process


def _killed(rng: Random) -> Fault:
    return Death(name="ComfyUI killed", codes=_CRASHED, delay_s=_soon(rng), restart_after_s=0.1)


def _killed_for_long(rng: Random) -> Fault:
    restart_after_s = round(rng.uniform(1.0, 2.5), 3)
    return Death(name="ComfyUI killed, back late", codes=_CRASHED, delay_s=_soon(rng), restart_after_s=restart_after_s)


def _killed_twice(rng: Random) -> Fault:
    again_after_s = round(rng.uniform(0.5, 1.5), 3)
    return Death(
        name="ComfyUI killed twice",
        codes=_CRASHED,
        delay_s=_soon(rng),
        restart_after_s=0.1,
        again_after_s=again_after_s,
    )


def _dies_at_event(rng: Random) -> Fault:
    event, needs = _event(rng)
    return DeathAtEvent(name="ComfyUI dies at an event", codes=_CRASHED, event=event, restart_after_s=0.1, needs=needs)


def _hangs(rng: Random) -> Fault:
    delay_s = rng.choice((None, _soon(rng)))
    return Hang(name="ComfyUI hangs until the worker kills it", codes=_HUNG, delay_s=delay_s)


def _hangs_and_is_killed(rng: Random) -> Fault:
    delay_s = rng.choice((None, _soon(rng)))
    killed_after_s = round(rng.uniform(0.3, 3.0), 3)
    return Hang(name="ComfyUI hangs and is killed", codes=_HUNG, delay_s=delay_s, killed_after_s=killed_after_s)


def _frozen(rng: Random) -> Fault:
    return Freeze(name="ComfyUI frozen for a while", delay_s=_soon(rng), seconds=round(rng.uniform(0.2, 1.2), 3))


# ------------------------------------------------------------------------------------------------- platform


def _platform(
    kind: str, response: PlatformFault, times: tuple[int, int] = (1, 1), needs: Shape | None = None
) -> FaultFactory:
    def draw(rng: Random) -> Fault:
        outcome = "cut" if response == "cut" else f"answered {response}"
        return BadPlatformResponse(
            name=f"{kind} {outcome}", kind=kind, response=response, times=rng.randint(*times), needs=needs
        )

    return draw


def _platform_down(rng: Random) -> Fault:
    return PlatformDown(name="platform down", delay_s=_soon(rng), seconds=round(rng.uniform(0.2, 1.0), 3))


_KINDS: Mapping[FaultFactory, int] = {
    _websocket_cut: 4,
    _websocket_cut_at_event: 4,
    _websocket_cut_often: 3,
    _websocket_refused: 3,
    _websocket_hanging: 1,
    _websocket_silent: 3,
    _websocket_silent_from_event: 3,
    _history_late: 3,
    _history_lost: 3,
    _prompt_deleted: 3,
    _interrupted: 3,
    _interrupt_ignored: 2,
    _answers_500("POST /prompt", _UNREACHABLE): 2,
    _answers_500("GET /history", times=(1, 3)): 2,
    _answers_500("GET /queue"): 2,
    _answers_500("POST /interrupt"): 2,
    _answers_500("POST /upload", frozenset({"upload_failed"})): 2,
    _slow_answers: 4,
    _answer_too_slow("POST /prompt"): 2,
    _answer_too_slow("GET /history"): 1,
    _answer_too_slow("POST /upload"): 1,
    _answer_too_slow("GET /queue"): 1,
    _answer_too_slow("POST /interrupt"): 1,
    _answer_lost("POST /prompt"): 3,
    _answer_lost("GET /history"): 2,
    _answer_lost("POST /upload"): 2,
    _answer_lost("GET /queue"): 1,
    _answer_lost("POST /interrupt"): 2,
    _killed: 5,
    _killed_for_long: 2,
    _killed_twice: 2,
    _dies_at_event: 4,
    _hangs_and_is_killed: 2,
    _frozen: 2,
    _platform("job-take", 500, times=(1, 2)): 3,
    _platform("job-take", "cut"): 2,
    _platform("job-done", 500): 2,
    _platform("job-done", "cut"): 2,
    _platform("job-stop", 500, needs=cancel_running): 1,
    _platform_down: 2,
}
OWN_KINDS: Mapping[FaultFactory, int] = {**_KINDS, _hangs: 1}
"""The weight of each kind if the worker has access to ComfyUI's process and files."""
REMOTE_KINDS: Mapping[FaultFactory, int] = {
    **_KINDS,
    _answers_500("GET /view"): 2,
    _view_broken: 2,
    _answer_too_slow("GET /view"): 1,
    _answer_lost("GET /view"): 2,
}
"""The weights if it has not: it cannot restart ComfyUI, and downloads outputs."""
