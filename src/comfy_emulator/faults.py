"""What a ComfyUI can do to its client on a bad day: each fault is a named field, off unless set.

Tests set them on the running emulator (`EmulatorServer.faults`) or over HTTP (`POST /_emulator/faults` with a JSON
object of fields, when the emulator was started with `--allow-faults`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class RequestRule(BaseModel):
    """Which requests a fault meets, and how often.

    Attributes:
        method: an HTTP method, or `*`.
        path: a path with `*` as wildcard; `/api/history/x` and `/history/x` are the same.
        times: how many requests it meets before it is over; None for every one.
    """

    model_config = ConfigDict(extra="forbid")

    method: str = "*"
    path: str = "*"
    times: int | None = Field(default=1, ge=1)

    def meets(self, method: str, path: str) -> bool:
        """Tell whether a request is one of those meant here."""
        return self.method in ("*", method) and fnmatchcase(_plain(path), _plain(self.path))


class StatusRule(RequestRule):
    """Requests answered with `status` and a line of text, unprocessed."""

    status: int = Field(ge=400, le=599)


class SlowRule(RequestRule):
    """Requests processed only after `seconds`."""

    seconds: float = Field(gt=0)


Rule = TypeVar("Rule", bound=RequestRule)


class Faults(BaseModel):
    """The faults of one emulator; all off at first."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    websocket: Literal["accept", "refuse", "hang"] = "accept"
    """New websockets: accepted, answered 503, or left waiting for the end of the handshake for ever."""

    drop_websocket_after: int | None = Field(default=None, ge=0)
    """Cut each websocket without a close frame when this many events were sent on it."""

    drop_websocket_at_event: str | None = None
    """Cut the websocket instead of sending this event (`executing`, `progress`, `preview`, …)."""

    drop_websocket_times: int | None = Field(default=None, ge=0)
    """How many websockets the two faults above cut before they are over; None for every one."""

    silent: bool = False
    """Websockets stay open and answer pings, but no event is sent on any."""

    silent_from_event: str | None = None
    """Go silent when this event is to be sent: it and all later ones are lost."""

    history_delay_s: float = Field(default=0, ge=0)
    """Seconds by which the entry of a finished prompt appears late in the history."""

    history_lost: bool = False
    """Finished prompts leave no entry in the history."""

    answer_status: list[StatusRule] = Field(default_factory=list)
    """Requests answered with an error status, unprocessed."""

    slow_answers: list[SlowRule] = Field(default_factory=list)
    """Requests kept waiting before they are processed."""

    lost_answers: list[RequestRule] = Field(default_factory=list)
    """Requests that are processed, and whose connection is cut before the answer."""

    hang: bool = False
    """Connections are accepted and requests read, but nothing is answered and no event sent, as by a frozen process."""

    delete_pending: int = Field(default=0, ge=0)
    """How many of the next submissions vanish while pending, as if somebody had deleted them from the queue."""

    ignore_interrupts: int = Field(default=0, ge=0)
    """How many of the next interrupts are answered 200 and stop nothing, as one that comes too early."""

    interrupt_ignores_prompt_id: bool = False
    """`/interrupt` stops whatever runs, whichever `prompt_id` it names, as older versions do."""

    die_at_event: str | None = None
    """Die instead of sending this event: the process ends at once, the in-process server as by `kill`."""

    def answer_with(self, status: int, path: str = "*", *, method: str = "*", times: int | None = 1) -> None:
        """Answer the next `times` requests for `path` with `status`."""
        self.answer_status.append(StatusRule(method=method, path=path, times=times, status=status))

    def slow_down(self, seconds: float, path: str = "*", *, method: str = "*", times: int | None = 1) -> None:
        """Keep the next `times` requests for `path` waiting for `seconds`."""
        self.slow_answers.append(SlowRule(method=method, path=path, times=times, seconds=seconds))

    def lose_answer(self, path: str = "/prompt", *, method: str = "POST", times: int | None = 1) -> None:
        """Process the next `times` requests for `path`, and cut the connection instead of answering."""
        self.lost_answers.append(RequestRule(method=method, path=path, times=times))

    def clear(self) -> None:
        """Switch all faults off."""
        for name, value in Faults():
            setattr(self, name, value)

    def update(self, other: Faults) -> None:
        """Take over the fields that were set in `other`, and leave the rest."""
        for name in other.model_fields_set:
            setattr(self, name, getattr(other, name))

    def takes_websocket(self) -> bool:
        """Count a websocket that is to be cut; False when enough were."""
        if self.drop_websocket_times is None:
            return True
        if self.drop_websocket_times == 0:
            return False
        self.drop_websocket_times -= 1
        return True

    def takes_submission(self) -> bool:
        """Count a submission that is to vanish; False when none is."""
        if self.delete_pending == 0:
            return False
        self.delete_pending -= 1
        return True

    def takes_interrupt(self) -> bool:
        """Count an interrupt that is to be ignored; False when none is."""
        if self.ignore_interrupts == 0:
            return False
        self.ignore_interrupts -= 1
        return True


def take(rules: list[Rule], method: str, path: str) -> Rule | None:
    """Give the first rule that meets the request, and count it; a rule that is used up is taken out."""
    rule = next((rule for rule in _snapshot(rules) if rule.meets(method, path)), None)
    if rule is not None and rule.times is not None:
        rule.times -= 1
        if rule.times == 0:
            rules.remove(rule)
    return rule


def _snapshot(rules: Sequence[Rule]) -> list[Rule]:
    """Copy the list, which a test may change from its own thread."""
    return list(rules)


def _plain(path: str) -> str:
    return path.removeprefix("/api")
