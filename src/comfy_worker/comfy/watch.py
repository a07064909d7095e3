"""Follows one prompt to its end: the websocket is a hint, history and queue are the truth, the clock has the last word.

ComfyUI is asked on every lost and reopened socket, whenever the socket says nothing of this prompt for a few seconds,
and at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import Gone, Outcome, PromptProtocol, outcome_from_history
from comfy_worker.comfy.socket import EventSocket
from comfy_worker.errors import ComfyUnreachable, TimedOut
from comfy_worker.jobs import OnEvent, QueuePosition
from comfy_worker.stop import Stop

_HISTORY_GRACE_S = 1.0
"""How long a prompt may be in neither queue nor history before it counts as gone."""


@dataclass
class Watch:
    """One prompt being followed.

    Attributes:
        timeout_s: how long the prompt may take from now on.
    """

    client: ComfyClient
    socket: EventSocket
    protocol: PromptProtocol
    on_event: OnEvent
    stop: Stop
    timeout_s: float

    def follow(self) -> Outcome:
        """Return how the prompt ended.

        Raises:
            Cancelled: `stop` was set; the prompt is still in ComfyUI.
            TimedOut: it took too long; the prompt is still in ComfyUI.
            ComfyUnreachable: ComfyUI gave no answer for `comfyui_lost_after_s`.
        """
        self._deadline = time.monotonic() + self.timeout_s
        self._ask_at = time.monotonic() + self.client.settings.comfyui_poll_interval_s
        self._unanswered_since: float | None = None
        self._missing_since: float | None = None
        with self.stop.waking(self.socket.abort):
            while True:
                self._listen()
                self.stop.check()
                self._check_deadline()
                if self.protocol.ended or time.monotonic() >= self._ask_at:
                    outcome = self._ask()
                    if outcome is not None:
                        return outcome

    def _listen(self) -> None:
        """Take in one frame, or find out that none comes."""
        if not self.socket.is_open and not self.socket.reopen():
            self.stop.wait(self._patience())
            return
        frame = self.socket.receive(self._patience())
        if frame is not None:
            self._tell(frame)
        elif not self.socket.is_open:
            self._ask_at = time.monotonic()

    def _patience(self) -> float:
        """Return the seconds until something other than a frame is due."""
        now = time.monotonic()
        due = [self._ask_at - now, self._deadline - now]
        if not self.socket.is_open and (attempt := self.socket.seconds_to_next_attempt()) is not None:
            due.append(attempt)
        return max(0.0, min(due))

    def _tell(self, frame: str | bytes) -> None:
        events = self.protocol.receive(frame)
        if events:
            self._ask_at = time.monotonic() + self.client.settings.comfyui_poll_interval_s
        for event in events:
            self.on_event(event)

    def _check_deadline(self) -> None:
        if time.monotonic() >= self._deadline:
            raise TimedOut(f"The workflow took longer than {self.timeout_s:g} seconds")

    def _ask(self) -> Outcome | None:
        """Return the outcome if ComfyUI has one."""
        self._ask_at = time.monotonic() + self._poll_interval()
        try:
            outcome = self._look_up()
        except ComfyUnreachable as error:
            self._check_patience(error)
            return None
        self._unanswered_since = None
        return outcome

    def _poll_interval(self) -> float:
        """Return the seconds to the next question: without a socket, or at the end, there is nothing else to go by."""
        interval = self.client.settings.comfyui_poll_interval_s
        return interval if self.socket.is_open and not self.protocol.ended else min(interval, 0.5)

    def _look_up(self) -> Outcome | None:
        entry = self.client.history(self.protocol.prompt_id)
        if entry is None:
            place = self.client.place(self.protocol.prompt_id)
            if place is not None:
                self._missing_since = None
                if not place.running:
                    self.on_event(QueuePosition(place.ahead))
                return None
            # It may have ended between the two questions.
            entry = self.client.history(self.protocol.prompt_id)
        return outcome_from_history(entry) if entry is not None else self._without_history()

    def _without_history(self) -> Outcome | None:
        """Return what to make of a prompt that ComfyUI does not know (any more)."""
        if self.protocol.heard is not None and not self.socket.was_lost:
            return self.protocol.heard
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < _HISTORY_GRACE_S:
            self._ask_at = now + _HISTORY_GRACE_S / 4
            return None
        return self.protocol.heard or Gone(self.protocol.started, connection_lost=self.socket.was_lost)

    def _check_patience(self, error: ComfyUnreachable) -> None:
        now = time.monotonic()
        if self._unanswered_since is None:
            self._unanswered_since = now
        if now - self._unanswered_since >= self.client.settings.comfyui_lost_after_s:
            raise self.client.unreachable() from error
