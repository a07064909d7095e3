"""Follows one prompt to its end. The websocket is a hint; history and queue decide how the prompt ended.

ComfyUI is asked whenever the socket was lost or reopened, when it sent nothing about the prompt for a few seconds, and
at the end.
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
_SHORT_POLL_INTERVAL_S = 0.25
"""Between two polls while something is wrong, for example without a socket."""


@dataclass
class Watch:
    """Follows one prompt."""

    client: ComfyClient
    socket: EventSocket
    protocol: PromptProtocol
    on_event: OnEvent
    stop: Stop
    deadline: Deadline

    _poll_at: float = field(default=0.0, init=False)
    _last_sign: float = field(default=0.0, init=False)
    """When the prompt last made progress, waited behind another, or could not be observed."""
    _last_position: PromptPosition | None = field(default=None, init=False)
    _pid: int | None = field(default=None, init=False)
    _unanswered_since: float | None = field(default=None, init=False)
    _down_since: float | None = field(default=None, init=False)
    _missing_since: float | None = field(default=None, init=False)
    _was_down: bool = field(default=False, init=False)
    _listened_from_start: bool = field(default=False, init=False)
    _got_frames: bool = field(default=False, init=False)
    _gets_events: bool = field(default=False, init=False)
    """Whether this socket has delivered events of the prompt since it was opened: silence then means no progress."""

    def follow(self, *, joined_late: bool = False) -> Outcome:
        """Return how the prompt ended; `joined_late` if it was submitted before this socket listened.

        Raises:
            Cancelled: `stop` was set; the prompt is still in ComfyUI.
            TimedOut: it took too long, or nothing happened for too long; the prompt is still in ComfyUI.
            ComfyUnreachable: ComfyUI accepts connections and did not answer for `comfyui_lost_after_s`.
        """
        self._last_sign = time.monotonic()
        # The first poll is early: it reports the queue position and detects a silent socket.
        self._poll_at = self._last_sign + min(self._poll_interval_s(), _SHORT_POLL_INTERVAL_S)
        self._listened_from_start = not joined_late and self.socket.is_open and not self.socket.was_lost
        self._pid = self.client.process.pid() if self.client.process else None
        with self.stop.calling(self.socket.abort):
            while True:
                self._listen()
                self.stop.check()
                self._check_limits()
                if self.protocol.ended or time.monotonic() >= self._poll_at:
                    outcome = self._poll()
                    if outcome is not None:
                        self._receive_late_images()
                        return outcome

    def _check_limits(self) -> None:
        self.deadline.check()
        stall = self.client.settings.comfyui_stall_timeout_s
        if time.monotonic() - self._last_sign >= stall:
            raise TimedOut(f"The workflow showed no sign of progress for {stall:g} seconds")

    # ------------------------------------------------------------------------------------------ websocket

    def _listen(self) -> None:
        """Receive one frame, or wait until something else is due; reopen a lost socket."""
        if not self.socket.is_open:
            self._gets_events = False
            if self.socket.reopen():
                self._poll_at = time.monotonic()
            else:
                self.stop.wait(self._seconds_until_due())
            return
        frame = self.socket.receive(self._seconds_until_due())
        if frame is not None:
            self._apply(frame)
        elif not self.socket.is_open:
            self._poll_at = time.monotonic()

    def _apply(self, frame: str | bytes) -> None:
        self._got_frames = True
        events = self.protocol.receive(frame)
        if events:
            self._gets_events = True
            self._last_sign = time.monotonic()
            self._poll_at = self._last_sign + self.client.settings.comfyui_poll_interval_s
        for event in events:
            self.on_event(event)

    def _seconds_until_due(self) -> float:
        """Return how long to wait for a frame before something else has to be done."""
        stall_s = self.client.settings.comfyui_stall_timeout_s
        seconds = min(self._poll_at, self.deadline.at, self._last_sign + stall_s) - time.monotonic()
        if not self.socket.is_open:
            attempt = self.socket.seconds_to_next_attempt()
            seconds = min(seconds, _SHORT_POLL_INTERVAL_S if attempt is None else attempt)
        return max(0.0, seconds)

    def _receive_late_images(self) -> None:
        """Receive the images that are still on their way: they exist nowhere but on the websocket.

        On a slow connection or a busy machine, the history may have the end of the prompt first.
        """
        ended_at = time.monotonic()
        while self.protocol.expects_images and not self.protocol.ended and self.socket.is_open:
            seconds = min(ended_at + self._max_silence_s(), self.deadline.at) - time.monotonic()
            if seconds <= 0:
                return
            frame = self.socket.receive(seconds)
            self.stop.check()
            if frame is not None:
                self._apply(frame)

    def _max_silence_s(self) -> float:
        """Return how long after the end of a prompt its frames may come."""
        lost_after_s = self.client.settings.comfyui_lost_after_s
        if self._gets_events:
            return lost_after_s
        return 0.0 if self.socket.was_lost else min(lost_after_s, _FIRST_FRAME_S)

    # ---------------------------------------------------------------------------------------------- polls

    def _poll_interval_s(self) -> float:
        interval = self.client.settings.comfyui_poll_interval_s
        is_normal = self.socket.is_open and not self.protocol.ended
        return interval if is_normal else min(interval, _SHORT_POLL_INTERVAL_S)

    def _poll(self) -> Outcome | None:
        """Ask ComfyUI for the prompt; return its outcome if there is one."""
        asked_at = time.monotonic()
        self._poll_at = asked_at + self._poll_interval_s()
        try:
            outcome = self._look_up()
        except ComfyUnreachable as error:
            return self._outcome_without_answer(error, asked_at)
        self._unanswered_since = self._down_since = None
        return outcome

    def _look_up(self) -> Outcome | None:
        entry = self.client.history(self.protocol.prompt_id)
        if entry is None:
            position = self.client.position(self.protocol.prompt_id)
            if position is not None:
                self._note_position(position)
                return None
            # It may have ended between the two requests.
            entry = self.client.history(self.protocol.prompt_id)
        return outcome_from_history(entry) if entry is not None else self._outcome_without_history()

    def _note_position(self, position: PromptPosition) -> None:
        self._last_position = position
        self._missing_since = None
        # The socket may have missed the start of the prompt, which starts the job's clock.
        for event in self.protocol.seen_running() if position.running else [PromptsAhead(position.ahead)]:
            self.on_event(event)
        # Without events a running prompt may make progress nevertheless: only the deadline counts then.
        if position.ahead or (position.running and not self._gets_events):
            self._last_sign = time.monotonic()

    def _outcome_without_history(self) -> Outcome | None:
        """Return the outcome of a prompt that is in neither history nor queue, None to ask again."""
        reported = self.protocol.reported_outcome
        if reported is not None and not self.socket.was_lost:
            return reported
        if self._was_down or self._is_another_process():
            return Lost(self._may_have_started())
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < _HISTORY_GRACE_S:
            self._poll_at = now + _SHORT_POLL_INTERVAL_S
            return None
        if reported is not None and not isinstance(reported, Succeeded):
            return reported
        # After a success of which frames were missed, the outputs are not known.
        return Lost(had_started=True) if self._may_have_started() else Deleted()

    def _outcome_without_answer(self, error: ComfyUnreachable, asked_at: float) -> Outcome | None:
        """Return `Lost` if ComfyUI is dead, None to ask again; raise if it hangs."""
        now = time.monotonic()
        self._poll_at = now + _SHORT_POLL_INTERVAL_S
        if self._is_dead():
            return Lost(self._may_have_started())
        self._unanswered_since = self._unanswered_since or asked_at
        if now - self._unanswered_since >= self.client.settings.comfyui_lost_after_s:
            raise self.client.unreachable() from error
        return None

    def _is_dead(self) -> bool:
        """Return whether ComfyUI's process is gone: nothing listens any more, or another process runs."""
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
        """Return False only if the prompt certainly did not start: by the queue, or by a socket that missed nothing."""
        if self.protocol.started:
            return True
        if self._last_position is not None:
            return self._last_position.running
        # ComfyUI notifies every client of a queued prompt: a socket without any frame does not work.
        return not (self._listened_from_start and self._got_frames)
