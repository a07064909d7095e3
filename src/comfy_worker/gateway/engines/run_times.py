"""How long workflows ran, to estimate how long such workflows will run."""

from __future__ import annotations

import bisect
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.graph.workflow import is_link
from comfy_worker.types import JobEvent, JobState, NodesCached, NodeStarted, Workflow

_RUNS_REMEMBERED = 5
_SIGNATURES_REMEMBERED = 256
_LONGEST_PROFILE = 256
"""How many points of a run's progress are remembered; a sampler with many steps reports more."""

Profile = Sequence[tuple[float, float]]
"""Points of a run's progress: percent, and the seconds after which it was reached."""


@dataclass
class RunRecorder:
    """Records the progress of one run, for estimates of later ones.

    Attributes:
        started_at: when ComfyUI began to run the prompt, in seconds since the epoch.
        percent: its progress.
        changed_at: when it reached that, in seconds since the epoch.
    """

    outputs: frozenset[str]
    started_at: float
    percent: float = 0.0
    changed_at: float = 0.0
    _profile: list[tuple[float, float]] = field(default_factory=list)
    _has_cached: bool = False
    _has_computed: bool = False

    @classmethod
    def of(cls, workflow: Workflow, started_at: float) -> RunRecorder:
        """Return the recorder of a run that has just started."""
        return cls(_output_nodes(workflow), started_at, changed_at=started_at)

    def record(self, event: JobEvent, percent: float, now: float) -> None:
        """Record an event, and the progress after it."""
        if isinstance(event, NodesCached):
            self._has_cached = self._has_cached or bool(event.node_ids)
        elif isinstance(event, NodeStarted):
            self._has_computed = self._has_computed or event.node_id not in self.outputs
        if percent > self.percent:
            self.percent, self.changed_at = percent, now
            if len(self._profile) < _LONGEST_PROFILE:
                self._profile.append((percent, now - self.started_at))

    @property
    def is_from_cache(self) -> bool:
        """Whether ComfyUI had all but the output nodes in its cache: such a run is no measure for others."""
        return self._has_cached and not self._has_computed

    @property
    def profile(self) -> Profile:
        """Its progress over time."""
        return tuple(self._profile)


class RunTimes:
    """How long workflows ran, by their signature; the caller holds a lock."""

    def __init__(self) -> None:
        self._by_signature: dict[str, deque[float]] = {}
        self._profiles: dict[str, tuple[Profile, float]] = {}

    def remember(self, signature: str, seconds: float, profile: Profile = ()) -> None:
        """Remember how long a run took, and its progress over time."""
        runs = self._by_signature.pop(signature, None) or deque(maxlen=_RUNS_REMEMBERED)
        runs.append(seconds)
        self._by_signature[signature] = runs
        if profile:
            self._profiles[signature] = (profile, seconds)
        if len(self._by_signature) > _SIGNATURES_REMEMBERED:
            longest_ago = next(iter(self._by_signature))
            del self._by_signature[longest_ago]
            self._profiles.pop(longest_ago, None)

    def learn(self, records: Iterable[JobRecord]) -> None:
        """Learn from jobs that ended before a restart, oldest first; the time includes their delivery."""
        for record in records:
            is_measure = record.state is JobState.COMPLETED and not (record.progress or {}).get("from_cache")
            if is_measure and record.started_at is not None and record.ended_at is not None:
                self.remember(record.signature, max(0.0, record.ended_at - record.started_at))

    def expected(self, signature: str) -> float | None:
        """Return how long a workflow will run; None if no workflow of the same signature has run yet.

        Other workflows are no measure: a video does not take as long as the images before it.
        """
        runs = self._by_signature.get(signature)
        return statistics.median(runs) if runs else None

    def remaining(self, signature: str, run: RunRecorder, now: float | None = None) -> float | None:
        """Return how much longer a run will take, in seconds; None if no workflow of the same signature has run yet."""
        expected = self.expected(signature)
        if expected is None:
            return None
        now = time.time() if now is None else now
        known = self._profiles.get(signature)
        if known is None or known[1] <= 0 or run.percent <= 0:
            return max(0.0, expected - (now - run.started_at))
        profile, seconds = known
        remaining, remaining_at_next = _remaining_parts(profile, seconds, run.percent)
        return max(0.0, remaining * expected - (now - run.changed_at), remaining_at_next * expected)


def _remaining_parts(profile: Profile, seconds: float, percent: float) -> tuple[float, float]:
    """Return which part of a remembered run remained at this progress, and at its next point: 1 to 0."""
    index = bisect.bisect_right(profile, percent, key=lambda point: point[0])
    before = profile[index - 1] if index else (0.0, 0.0)
    after = profile[index] if index < len(profile) else (100.0, seconds)
    part = (percent - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    at = before[1] + min(1.0, part) * (after[1] - before[1])
    return max(0.0, 1.0 - at / seconds), max(0.0, 1.0 - after[1] / seconds)


def _output_nodes(workflow: Workflow) -> frozenset[str]:
    """Return the nodes at the end of the graph, whose results no other node takes."""
    inputs = (value for node in workflow.values() for value in node.get("inputs", {}).values())
    return frozenset(workflow) - {value[0] for value in inputs if is_link(value)}
