"""What goes wrong in a soak: a fault begins at a moment of a round of jobs and is over when the round is."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.comfyui import KeptComfyUI
from benchmarks.soak.shapes import WEBSOCKET, Shape, SoakJob
from comfy_emulator.faults import Faults
from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import PlatformFault

_NORMAL = Faults().model_dump()
_COUNTED = frozenset(
    ("answer_status", "slow_answers", "lost_answers", "delete_pending", "ignore_interrupts", "drop_websocket_times")
)
"""Fields of the emulator's faults that change when they are met."""


@dataclass(frozen=True)
class Scene:
    """Where it happens."""

    comfyui: KeptComfyUI
    platform: Platform


Action = Callable[[Scene], None]


@dataclass(kw_only=True)
class Fault(ABC):
    """One fault of one round.

    Attributes:
        name: its kind, as the table calls it.
        codes: what a job may fail with that runs while the fault is on; none for a fault that may harm no job.
        delay_s: seconds after the round's jobs were submitted at which it begins; None: before they are.
        needs: a shape that one of the round's jobs must have, or the fault would not be met.
        loses_answers_to_results: the platform may have taken a result whose answer is lost, so that the worker cannot
            but post the same result again.
    """

    name: str
    codes: frozenset[str] = frozenset()
    delay_s: float | None = None
    needs: Shape | None = None
    loses_answers_to_results: bool = False

    @abstractmethod
    def begin(self, scene: Scene) -> None:
        """Let it happen."""

    def later(self) -> Iterator[tuple[float, Action]]:
        """Yield what else happens in its course, with the seconds after its beginning."""
        return iter(())

    def end(self, scene: Scene) -> bool:
        """Make good what is left of it, when all jobs of the round have ended; return whether it was met."""
        del scene
        return True

    def codes_for(self, job: SoakJob) -> frozenset[str]:
        """Return what a job may fail with because of it."""
        del job
        return self.codes

    def may_lack_files(self, job: SoakJob) -> bool:
        """Return whether a job may complete without some of its files, if a warning says so."""
        del job
        return False


@dataclass(kw_only=True)
class Wire(Fault):
    """What the emulator does to requests, websockets and history.

    Attributes:
        fields: as `POST /_emulator/faults` takes them.
        cut_first: cut the websocket that the worker has open, so that it needs a new one.
        about_websocket: pictures that only the websocket has may get lost.
        lacks_files: any file may be missing.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    cut_first: bool = False
    about_websocket: bool = False
    lacks_files: bool = False

    def begin(self, scene: Scene) -> None:
        """Set the fields."""
        scene.comfyui.set_faults(self.fields)
        if self.cut_first:
            scene.comfyui.drop_websockets()

    def end(self, scene: Scene) -> bool:
        """Reset the fields; those that count what they meet tell whether they were met."""
        left = scene.comfyui.faults()
        scene.comfyui.set_faults({name: _NORMAL[name] for name in self.fields})
        counted = _COUNTED.intersection(self.fields)
        return not counted or any(left[name] != self.fields[name] for name in counted)

    def codes_for(self, job: SoakJob) -> frozenset[str]:
        """Return what a job may fail with because of it."""
        return self.codes | {"output_missing"} if self._loses_pictures_of(job) else self.codes

    def may_lack_files(self, job: SoakJob) -> bool:
        """Return whether a file of the job may be missing."""
        return self.lacks_files or self._loses_pictures_of(job)

    def _loses_pictures_of(self, job: SoakJob) -> bool:
        return self.about_websocket and job.shape == WEBSOCKET


@dataclass(kw_only=True)
class Interrupt(Fault):
    """Somebody at the editor stops whatever runs."""

    def begin(self, scene: Scene) -> None:
        """Stop it."""
        scene.comfyui.interrupt()


@dataclass(kw_only=True)
class Death(Fault):
    """ComfyUI is killed and started again, `times` times.

    Attributes:
        restart_after_s: how long it stays away.
        again_after_s: how much later it is killed once more; None: not.
    """

    restart_after_s: float
    again_after_s: float | None = None

    def begin(self, scene: Scene) -> None:
        """Kill it."""
        scene.comfyui.restart_after_s = self.restart_after_s
        scene.comfyui.signal(signal.SIGKILL)

    def later(self) -> Iterator[tuple[float, Action]]:
        """Kill it once more."""
        if self.again_after_s is not None:
            yield self.again_after_s, lambda scene: scene.comfyui.signal(signal.SIGKILL)


@dataclass(kw_only=True)
class DeathAtEvent(Fault):
    """ComfyUI dies instead of sending an event."""

    event: str
    restart_after_s: float
    _starts: int = 0

    def begin(self, scene: Scene) -> None:
        """Name the event."""
        self._starts = scene.comfyui.starts
        scene.comfyui.restart_after_s = self.restart_after_s
        scene.comfyui.set_faults({"die_at_event": self.event})

    def end(self, scene: Scene) -> bool:
        """Forget the event if it did not come."""
        scene.comfyui.set_faults({"die_at_event": None})
        return scene.comfyui.starts > self._starts


@dataclass(kw_only=True)
class Hang(Fault):
    """ComfyUI takes connections and answers nothing until it is killed: by its supervisor, or else by the worker.

    Attributes:
        killed_after_s: when its supervisor kills it; None: never.
    """

    killed_after_s: float | None = None
    _starts: int = 0

    def begin(self, scene: Scene) -> None:
        """Let it hang."""
        self._starts = scene.comfyui.starts
        scene.comfyui.set_faults({"hang": True})

    def later(self) -> Iterator[tuple[float, Action]]:
        """Let its supervisor kill it."""
        if self.killed_after_s is not None:
            yield self.killed_after_s, self._kill

    def _kill(self, scene: Scene) -> None:
        if scene.comfyui.starts == self._starts:
            scene.comfyui.signal(signal.SIGKILL)

    def end(self, scene: Scene) -> bool:
        """Let it go on if no job noticed."""
        was_killed = scene.comfyui.starts > self._starts
        if not was_killed:
            scene.comfyui.set_faults({"hang": False})
        return was_killed


@dataclass(kw_only=True)
class Freeze(Fault):
    """ComfyUI's process stands still for a while, and goes on as if nothing had been."""

    seconds: float

    def begin(self, scene: Scene) -> None:
        """Stop it."""
        scene.comfyui.signal(signal.SIGSTOP)

    def later(self) -> Iterator[tuple[float, Action]]:
        """Let it go on."""
        yield self.seconds, lambda scene: scene.comfyui.signal(signal.SIGCONT)

    def codes_for(self, job: SoakJob) -> frozenset[str]:
        """Return what a job may fail with: a websocket that cannot be opened in time has its pictures lost."""
        return self.codes | {"output_missing"} if job.shape == WEBSOCKET else self.codes

    def end(self, scene: Scene) -> bool:
        """Let it go on, however short the round was."""
        scene.comfyui.signal(signal.SIGCONT)
        return True


@dataclass(kw_only=True)
class PlatformMischief(Fault):
    """The platform answers one kind of request badly."""

    kind: str
    mischief: PlatformFault
    times: int = 1
    _calls_before: int = 0

    def begin(self, scene: Scene) -> None:
        """Have the next requests answered badly."""
        self._calls_before = len(scene.platform.state.calls)
        scene.platform.inject_fault(self.kind, self.mischief, self.times)

    def end(self, scene: Scene) -> bool:
        """Behave again; it was met if a request since then was answered so."""
        scene.platform.clear_faults()
        answered = None if self.mischief == "cut" else self.mischief
        since = scene.platform.state.calls[self._calls_before :]
        return any(call.kind == self.kind and call.status == answered for call in since)


@dataclass(kw_only=True)
class PlatformDown(Fault):
    """The platform cuts all connections and takes none for a while."""

    seconds: float
    loses_answers_to_results: bool = True
    _is_down: bool = False

    def begin(self, scene: Scene) -> None:
        """Go down."""
        self._is_down = True
        scene.platform.refuse_connections()

    def later(self) -> Iterator[tuple[float, Action]]:
        """Come back."""
        yield self.seconds, self._come_back

    def _come_back(self, scene: Scene) -> None:
        if self._is_down:
            self._is_down = False
            scene.platform.accept_connections()

    def end(self, scene: Scene) -> bool:
        """Come back, however short the round was."""
        self._come_back(scene)
        return True
