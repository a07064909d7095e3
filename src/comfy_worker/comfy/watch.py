"""Follows one prompt to its end: the websocket is a hint, history and queue are the truth, the clock has the last word.

ComfyUI is asked on every lost and reopened socket, whenever the socket says nothing of this prompt for a few seconds,
and at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import (
    Deleted,
    Lost,
    Outcome,
    PromptPosition,
    PromptProtocol,
    Succeeded,
    outcome_from_history,
)
from comfy_worker.comfy.socket import EventSocket
from comfy_worker.errors import ComfyUnreachable, TimedOut
from comfy_worker.stop import Deadline, Stop
from comfy_worker.types import OnEvent, PromptsAhead

_HISTORY_GRACE_S = 1.0
"""How long a prompt may be in neither queue nor history before it counts as gone."""
_FIRST_FRAME_S = 2.0
"""How long after the end of a prompt its first frame may come on a websocket that has missed nothing."""
_DOWN_GRACE_S = 0.5
"""How long nothing may listen at ComfyUI's port before it counts as dead."""
_HURRIED_INTERVAL_S = 0.25
"""Between two questions while something is wrong; without a socket there is nothing else to go by."""


@dataclass
class Watch:
    """One prompt being followed."""

    client: ComfyClient
    socket: EventSocket
    protocol: PromptProtocol
    on_event: OnEvent
    stop: Stop
    deadline: Deadline

    _ask_at: float = field(default=0.0, init=False)
    _last_sign: float = field(default=0.0, init=False)
    """When the prompt was last seen to get on, or to wait behind another, or could not be heard."""
    _last_place: PromptPosition | None = field(default=None, init=False)
    _pid: int | None = field(default=None, init=False)
    _unanswered_since: float | None = field(default=None, init=False)
    _down_since: float | None = field(default=None, init=False)
    _missing_since: float | None = field(default=None, init=False)
    _was_down: bool = field(default=False, init=False)
    _listened_from_start: bool = field(default=False, init=False)
    _heard_frames: bool = field(default=False, init=False)
    _hears_prompt: bool = field(default=False, init=False)
    """Whether this socket, since it was opened, has told of the prompt: then its silence means something."""

    def follow(self, *, joined_late: bool = False) -> Outcome:
        """Return how the prompt ended; `joined_late` if it was in ComfyUI before this listened.

        Raises:
            Cancelled: `stop` was set; the prompt is still in ComfyUI.
            TimedOut: it took too long, or nothing happened for too long; the prompt is still in ComfyUI.
            ComfyUnreachable: ComfyUI takes connections and gave no answer for `comfyui_lost_after_s`.
        """
        self._last_sign = time.monotonic()
        # Soon for the first time: one that has to wait is told its place, one of which nothing is heard is found.
        self._ask_at = self._last_sign + min(self._interval(), _HURRIED_INTERVAL_S)
        self._listened_from_start = not joined_late and self.socket.is_open and not self.socket.was_lost
        self._pid = self.client.process.pid() if self.client.process else None
        with self.stop.calling(self.socket.abort):
            while True:
                self._listen()
                self.stop.check()
                self._check_limits()
                if self.protocol.ended or time.monotonic() >= self._ask_at:
                    outcome = self._ask()
                    if outcome is not None:
                        self._hear_out()
                        return outcome

    # ------------------------------------------------------------------------------------------ websocket

    def _listen(self) -> None:
        """Take in one frame, or find out that none comes."""
        if not self.socket.is_open:
            self._hears_prompt = False
            if self.socket.reopen():
                self._ask_at = time.monotonic()
            else:
                self.stop.wait(self._patience())
            return
        frame = self.socket.receive(self._patience())
        if frame is not None:
            self._tell(frame)
        elif not self.socket.is_open:
            self._ask_at = time.monotonic()

    def _hear_out(self) -> None:
        """Take in the pictures that are still on their way: they exist nowhere but on the websocket.

        The history may tell of the end first: where the connection is slow, or this process had to wait for a CPU.
        """
        ended_at = time.monotonic()
        while self.protocol.awaits_pictures and not self.protocol.ended and self.socket.is_open:
            patience_s = min(ended_at + self._longest_silence_s(), self.deadline.at) - time.monotonic()
            if patience_s <= 0:
                return
            frame = self.socket.receive(patience_s)
            self.stop.check()
            if frame is not None:
                self._tell(frame)

    def _longest_silence_s(self) -> float:
        """Return how long after the end of a prompt its frames may come, in seconds."""
        lost_after_s = self.client.settings.comfyui_lost_after_s
        if self._hears_prompt:
            return lost_after_s
        return 0.0 if self.socket.was_lost else min(lost_after_s, _FIRST_FRAME_S)

    def _patience(self) -> float:
        """Return the seconds until something other than a frame is due."""
        stall_s = self.client.settings.comfyui_stall_timeout_s
        due = [self._ask_at, self.deadline.at, self._last_sign + stall_s]
        patience = min(due) - time.monotonic()
        if not self.socket.is_open:
            attempt = self.socket.seconds_to_next_attempt()
            patience = min(patience, _HURRIED_INTERVAL_S if attempt is None else attempt)
        return max(0.0, patience)

    def _tell(self, frame: str | bytes) -> None:
        self._heard_frames = True
        events = self.protocol.receive(frame)
        if events:
            self._hears_prompt = True
            self._last_sign = time.monotonic()
            self._ask_at = self._last_sign + self.client.settings.comfyui_poll_interval_s
        for event in events:
            self.on_event(event)

    # --------------------------------------------------------------------------------------------- limits

    def _check_limits(self) -> None:
        self.deadline.check()
        stall = self.client.settings.comfyui_stall_timeout_s
        if time.monotonic() - self._last_sign >= stall:
            raise TimedOut(f"The workflow showed no sign of progress for {stall:g} seconds")

    # ------------------------------------------------------------------------------------------ questions

    def _ask(self) -> Outcome | None:
        """Return the outcome if there is one."""
        asked_at = time.monotonic()
        self._ask_at = asked_at + self._interval()
        try:
            outcome = self._look_up()
        except ComfyUnreachable as error:
            return self._without_answer(error, asked_at)
        self._unanswered_since = self._down_since = None
        return outcome

    def _interval(self) -> float:
        """Return the seconds until the next question if nothing is heard before."""
        interval = self.client.settings.comfyui_poll_interval_s
        settled = self.socket.is_open and not self.protocol.ended
        return interval if settled else min(interval, _HURRIED_INTERVAL_S)

    def _look_up(self) -> Outcome | None:
        entry = self.client.history(self.protocol.prompt_id)
        if entry is None:
            place = self.client.place(self.protocol.prompt_id)
            if place is not None:
                self._stands_at(place)
                return None
            # It may have ended between the two questions.
            entry = self.client.history(self.protocol.prompt_id)
        return outcome_from_history(entry) if entry is not None else self._without_history()

    def _stands_at(self, place: PromptPosition) -> None:
        self._last_place = place
        self._missing_since = None
        # Its beginning may have been told while nobody could hear it; the clock of a job runs from there.
        for event in self.protocol.seen_running() if place.running else [PromptsAhead(place.ahead)]:
            self.on_event(event)
        # A prompt that runs and cannot be heard may get on for all one knows: only the deadline counts for it.
        if place.ahead or (place.running and not self._hears_prompt):
            self._last_sign = time.monotonic()

    def _without_history(self) -> Outcome | None:
        """Return what to make of a prompt that ComfyUI does not know (any more)."""
        if self.protocol.heard is not None and not self.socket.was_lost:
            return self.protocol.heard
        if self._was_down or self._is_another_process():
            return Lost(self._may_have_started())
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < _HISTORY_GRACE_S:
            self._ask_at = now + _HURRIED_INTERVAL_S
            return None
        if self.protocol.heard is not None and not isinstance(self.protocol.heard, Succeeded):
            return self.protocol.heard
        # A success of which some frames were missed, and which the history does not have: its outputs are not known.
        return Lost(had_started=True) if self._may_have_started() else Deleted()

    def _without_answer(self, error: ComfyUnreachable, asked_at: float) -> Outcome | None:
        """Return what to make of a ComfyUI that did not answer: dead, starting again, or hanging."""
        now = time.monotonic()
        self._ask_at = now + _HURRIED_INTERVAL_S
        if self._is_dead():
            return Lost(self._may_have_started())
        self._unanswered_since = self._unanswered_since or asked_at
        if now - self._unanswered_since >= self.client.settings.comfyui_lost_after_s:
            raise self.client.unreachable() from error
        return None

    def _is_dead(self) -> bool:
        """Return whether ComfyUI's process is gone: nothing listens any more, or it is known to have ended."""
        if self._is_another_process():
            return True
        if self.client.is_listening():
            self._down_since = None
            return False
        self._was_down = True
        now = time.monotonic()
        self._down_since = self._down_since or now
        return now - self._down_since >= _DOWN_GRACE_S

    def _is_another_process(self) -> bool:
        return self._pid is not None and self.client.process is not None and self.client.process.pid() != self._pid

    def _may_have_started(self) -> bool:
        """Return whether the prompt may have begun: only a socket that missed nothing, or the queue, tells that not."""
        if self.protocol.started:
            return True
        if self._last_place is not None:
            return self._last_place.running
        # That a prompt was queued is told to everyone: who heard not even that has a socket on which nothing comes.
        return not (self._listened_from_start and self._heard_frames)
