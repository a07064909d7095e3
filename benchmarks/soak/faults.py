"""The faults of a soak test; each starts during a round of jobs and ends with it."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.shapes import WEBSOCKET, Shape, SoakJob
from benchmarks.soak.supervised_comfyui import SupervisedComfyUI
from comfy_emulator.faults import Faults
from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import PlatformFault

_NORMAL = Faults().model_dump()
_COUNTED = frozenset(
    ("answer_status", "slow_answers", "lost_answers", "delete_pending", "ignore_interrupts", "drop_websocket_times")
)
"""Faults of the emulator with a counter."""


@dataclass(frozen=True)
class Targets:
    """What faults are injected into."""

    comfyui: SupervisedComfyUI
    platform: Platform


Action = Callable[[Targets], None]


@dataclass(kw_only=True)
class Fault(ABC):
    """One fault of one round.

    Attributes:
        name: its kind, as in the report.
        codes: error codes that it may cause.
        delay_s: seconds from the submission of the round's jobs to its start; None: before the submission.
        needs: a shape of job without which it has no effect.
        loses_answers_to_results: whether the platform may have stored a result whose response is lost, so that the
            worker posts it again.
    """

    name: str
    codes: frozenset[str] = frozenset()
    delay_s: float | None = None
    needs: Shape | None = None
    loses_answers_to_results: bool = False

    @abstractmethod
    def begin(self, targets: Targets) -> None:
        """Start the fault."""

    def later(self) -> Iterator[tuple[float, Action]]:
        """Yield further actions, with their seconds after the start."""
        return iter(())

    def end(self, targets: Targets) -> bool:
        """End the fault after the round, and return whether it affected anything."""
        del targets
        return True

    def codes_for(self, job: SoakJob) -> frozenset[str]:
        """Return the error codes that it may cause in a job."""
        del job
        return self.codes

    def may_lack_files(self, job: SoakJob) -> bool:
        """Return whether a job may complete without some files, with a warning."""
        del job
        return False


@dataclass(kw_only=True)
class EmulatorFault(Fault):
    """A fault of requests, WebSockets or history, set on the emulator.

    Attributes:
        fields: the body of `POST /_emulator/faults`.
        cut_first: whether the worker's WebSocket is cut first, so that it opens a new one.
        about_websocket: whether images that come only on the WebSocket may be lost.
        lacks_files: whether any file may be missing.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    cut_first: bool = False
    about_websocket: bool = False
    lacks_files: bool = False

    def begin(self, targets: Targets) -> None:
        """Set the fields."""
        targets.comfyui.set_faults(self.fields)
        if self.cut_first:
            targets.comfyui.drop_websockets()

    def end(self, targets: Targets) -> bool:
        """Reset the fields; the counters say whether they had an effect."""
        current = targets.comfyui.faults()
        targets.comfyui.set_faults({name: _NORMAL[name] for name in self.fields})
        counted = _COUNTED.intersection(self.fields)
        return not counted or any(current[name] != self.fields[name] for name in counted)

    def codes_for(self, job: SoakJob) -> frozenset[str]:
        """Return the error codes that it may cause in a job."""
        return self.codes | {"output_missing"} if self._loses_pictures_of(job) else self.codes

    def may_lack_files(self, job: SoakJob) -> bool:
        """Return whether a file of the job may be missing."""
        return self.lacks_files or self._loses_pictures_of(job)

    def _loses_pictures_of(self, job: SoakJob) -> bool:
        return self.about_websocket and job.shape == WEBSOCKET


@dataclass(kw_only=True)
class Interrupt(Fault):
    """Another client interrupts the running prompt."""

    def begin(self, targets: Targets) -> None:
        """Interrupt it."""
        targets.comfyui.interrupt()


@dataclass(kw_only=True)
class Death(Fault):
    """ComfyUI is killed and started again.

    Attributes:
        restart_after_s: seconds until its restart.
        again_after_s: seconds until a second kill; None: no second kill.
    """

    restart_after_s: float
    again_after_s: float | None = None

    def begin(self, targets: Targets) -> None:
        """Kill it."""
        targets.comfyui.restart_after_s = self.restart_after_s
        targets.comfyui.signal(signal.SIGKILL)

    def later(self) -> Iterator[tuple[float, Action]]:
        """Kill it a second time."""
        if self.again_after_s is not None:
            yield self.again_after_s, lambda targets: targets.comfyui.signal(signal.SIGKILL)


@dataclass(kw_only=True)
class DeathAtEvent(Fault):
    """ComfyUI dies instead of sending an event."""

    event: str
    restart_after_s: float
    _starts: int = 0

    def begin(self, targets: Targets) -> None:
        """Set the event."""
        self._starts = targets.comfyui.starts
        targets.comfyui.restart_after_s = self.restart_after_s
        targets.comfyui.set_faults({"die_at_event": self.event})

    def end(self, targets: Targets) -> bool:
        """Reset the event."""
        targets.comfyui.set_faults({"die_at_event": None})
        return targets.comfyui.starts > self._starts


@dataclass(kw_only=True)
class Hang(Fault):
    """ComfyUI accepts connections but does not respond, until its supervisor or the worker kills it.

    Attributes:
        killed_after_s: seconds until its supervisor kills it; None: never.
    """

    killed_after_s: float | None = None
    _starts: int = 0

    def begin(self, targets: Targets) -> None:
        """Start hanging."""
        self._starts = targets.comfyui.starts
        targets.comfyui.set_faults({"hang": True})

    def later(self) -> Iterator[tuple[float, Action]]:
        """Kill it as its supervisor."""
        if self.killed_after_s is not None:
            yield self.killed_after_s, self._kill

    def _kill(self, targets: Targets) -> None:
        if targets.comfyui.starts == self._starts:
            targets.comfyui.signal(signal.SIGKILL)

    def end(self, targets: Targets) -> bool:
        """End the hanging if no job noticed it."""
        was_killed = targets.comfyui.starts > self._starts
        if not was_killed:
            targets.comfyui.set_faults({"hang": False})
        return was_killed


@dataclass(kw_only=True)
class Freeze(Fault):
    """ComfyUI's process is stopped for a while."""

    seconds: float

    def begin(self, targets: Targets) -> None:
        """Send SIGSTOP."""
        targets.comfyui.signal(signal.SIGSTOP)

    def later(self) -> Iterator[tuple[float, Action]]:
        """Send SIGCONT."""
        yield self.seconds, lambda targets: targets.comfyui.signal(signal.SIGCONT)

    def codes_for(self, job: SoakJob) -> frozenset[str]:
        """Return the error codes; images are lost if a WebSocket cannot be opened in time."""
        return self.codes | {"output_missing"} if job.shape == WEBSOCKET else self.codes

    def end(self, targets: Targets) -> bool:
        """Send SIGCONT, also after a short round."""
        targets.comfyui.signal(signal.SIGCONT)
        return True


@dataclass(kw_only=True)
class BadPlatformResponse(Fault):
    """The platform responds wrongly to one kind of request."""

    kind: str
    response: PlatformFault
    times: int = 1
    _calls_before: int = 0

    def begin(self, targets: Targets) -> None:
        """Set the fault."""
        self._calls_before = len(targets.platform.state.calls)
        targets.platform.inject_fault(self.kind, self.response, self.times)

    def end(self, targets: Targets) -> bool:
        """Reset the fault, and return whether a request got that response."""
        targets.platform.clear_faults()
        status = None if self.response == "cut" else self.response
        since = targets.platform.state.calls[self._calls_before :]
        return any(call.kind == self.kind and call.status == status for call in since)


@dataclass(kw_only=True)
class PlatformDown(Fault):
    """The platform closes all connections and accepts none for a while."""

    seconds: float
    loses_answers_to_results: bool = True
    _is_down: bool = False

    def begin(self, targets: Targets) -> None:
        """Go down."""
        self._is_down = True
        targets.platform.refuse_connections()

    def later(self) -> Iterator[tuple[float, Action]]:
        """Accept connections again."""
        yield self.seconds, self._accept_again

    def _accept_again(self, targets: Targets) -> None:
        if self._is_down:
            self._is_down = False
            targets.platform.accept_connections()

    def end(self, targets: Targets) -> bool:
        """Accept connections again, also after a short round."""
        self._accept_again(targets)
        return True
