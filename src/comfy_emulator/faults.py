"""Faults of a ComfyUI that tests can switch on; each is a field of `Faults` and off by default.

Tests set them on a running emulator (`EmulatorServer.faults`), or over HTTP with `POST /_emulator/faults` and a JSON
object of fields if the emulator was started with `--allow-faults`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class RequestRule(BaseModel):
    """Which requests a fault applies to, and how often.

    Attributes:
        method: an HTTP method, or `*`.
        path: a path with `*` as wildcard; `/api/history/x` and `/history/x` are the same.
        times: number of requests that it applies to; None for all.
    """

    model_config = ConfigDict(extra="forbid")

    method: str = "*"
    path: str = "*"
    times: int | None = Field(default=1, ge=1)

    def matches(self, method: str, path: str) -> bool:
        """Return whether the fault applies to a request."""
        return self.method in ("*", method) and fnmatchcase(path.removeprefix("/api"), self.path.removeprefix("/api"))


class StatusRule(RequestRule):
    """Requests that get the response `status` and are not processed."""

    status: int = Field(ge=400, le=599)


class SlowRule(RequestRule):
    """Requests that are processed `seconds` late."""

    seconds: float = Field(gt=0)


Rule = TypeVar("Rule", bound=RequestRule)


class Faults(BaseModel):
    """The faults of one emulator."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    websocket: Literal["accept", "refuse", "hang"] = "accept"
    """New WebSockets are accepted, refused with status 503, or get no response to their handshake."""

    drop_websocket_after: int | None = Field(default=None, ge=0)
    """Cut each WebSocket without a close frame after this number of events."""

    drop_websocket_at_event: str | None = None
    """Cut the WebSocket instead of sending this event (`executing`, `progress`, `preview`, …)."""

    drop_websocket_times: int | None = Field(default=None, ge=0)
    """Number of WebSockets that the two faults above cut; None for all."""

    silent: bool = False
    """WebSockets stay open and answer pings, but no events are sent."""

    silent_from_event: str | None = None
    """Set `silent` when this event is due; it is the first one lost."""

    history_delay_s: float = Field(default=0, ge=0)
    """Seconds until a finished prompt appears in the history."""

    history_lost: bool = False
    """Finished prompts never appear in the history."""

    answer_status: list[StatusRule] = Field(default_factory=list)
    """Requests that get an error status and are not processed."""

    slow_answers: list[SlowRule] = Field(default_factory=list)
    """Requests that are processed late."""

    lost_answers: list[RequestRule] = Field(default_factory=list)
    """Requests that are processed, but whose connection is cut before the response."""

    hang: bool = False
    """Like a frozen process: connections are accepted, but no response and no event is sent."""

    delete_pending: int = Field(default=0, ge=0)
    """Number of coming submissions that vanish while pending, as if another client had deleted them."""

    ignore_interrupts: int = Field(default=0, ge=0)
    """Number of coming interrupts that get status 200 but have no effect, like one that is too early."""

    interrupt_ignores_prompt_id: bool = False
    """`/interrupt` ignores `prompt_id` and stops the running prompt, as older versions of ComfyUI did."""

    die_at_event: str | None = None
    """Die instead of sending this event: the process exits; an `EmulatorServer` drops everything, as by `kill`."""

    def answer_with(self, status: int, path: str = "*", *, method: str = "*", times: int | None = 1) -> None:
        """Let the next `times` requests for `path` fail with `status`."""
        self.answer_status.append(StatusRule(method=method, path=path, times=times, status=status))

    def slow_down(self, seconds: float, path: str = "*", *, method: str = "*", times: int | None = 1) -> None:
        """Process the next `times` requests for `path` `seconds` late."""
        self.slow_answers.append(SlowRule(method=method, path=path, times=times, seconds=seconds))

    def lose_answer(self, path: str = "/prompt", *, method: str = "POST", times: int | None = 1) -> None:
        """Process the next `times` requests for `path`, but cut the connection before the response."""
        self.lost_answers.append(RequestRule(method=method, path=path, times=times))

    def clear(self) -> None:
        """Switch all faults off."""
        for name, value in Faults():
            setattr(self, name, value)

    def update(self, other: Faults) -> None:
        """Copy the fields that were set in `other`, and leave the rest."""
        for name in other.model_fields_set:
            setattr(self, name, getattr(other, name))

    def count_down(self, counter: Literal["drop_websocket_times", "delete_pending", "ignore_interrupts"]) -> bool:
        """Use up one occurrence of a fault with a counter; return False when none is left."""
        left: int | None = getattr(self, counter)
        if left == 0:
            return False
        if left is not None:
            setattr(self, counter, left - 1)
        return True


def take_rule(rules: list[Rule], method: str, path: str) -> Rule | None:
    """Return the first rule that matches a request, and count it; a rule that is used up is removed."""
    # A copy: a test may change the list from its own thread.
    rule = next((rule for rule in list(rules) if rule.matches(method, path)), None)
    if rule is not None and rule.times is not None:
        rule.times -= 1
        if rule.times == 0:
            rules.remove(rule)
    return rule
