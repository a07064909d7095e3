"""What came of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Found:
    """Figures of a run.

    Attributes:
        accepted: jobs.
        sent_again: requests that got no answer, or a refusal for the time being.
        faults: how many of each kind.
        states: how the jobs ended.
        begun_anew: how often a job that had begun waited again, because its worker was lost.
        lost: jobs that did not end, or that nobody knows any more.
        doubled: jobs that ended twice, or of which one request made two.
        outputs: that were fetched, and were what was asked for.
        webhooks: that arrived, by their ids.
        webhooks_missing: ends of which nobody was told.
        webhooks_repeated: webhooks that came again under their id, though no gateway was killed meanwhile.
        webhooks_repeated_after_kill: those that came again because a kill fell between their answer and its note.
        violations: sentences on what must not be.
    """

    seed: int
    accepted: int = 0
    sent_again: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    begun_anew: int = 0
    lost: int = 0
    doubled: int = 0
    outputs: int = 0
    webhooks: int = 0
    webhooks_missing: int = 0
    webhooks_repeated: int = 0
    webhooks_repeated_after_kill: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict, repr=False)


def as_markdown(found: Found) -> str:
    """Return the tables for docs/development/soak.md."""
    figures: list[tuple[str, object]] = [
        ("seed", found.seed),
        ("minutes", round(found.seconds / 60, 1)),
        ("jobs accepted", found.accepted),
        ("requests sent again", found.sent_again),
        ("faults", found.faults.total()),
        *((f"ended as {state}", count) for state, count in sorted(found.states.items())),
        ("begun anew after their worker was lost", found.begun_anew),
        ("lost", found.lost),
        ("doubled", found.doubled),
        ("outputs checked", found.outputs),
        ("webhooks", found.webhooks),
        ("webhooks missing", found.webhooks_missing),
        ("webhooks repeated", found.webhooks_repeated),
        ("webhooks repeated because of a kill, under their id", found.webhooks_repeated_after_kill),
        ("violations", len(found.violations)),
    ]
    return "\n".join([_table("fleet", figures), _table("fault", sorted(found.faults.items()))])


def _table(head: str, rows: list[tuple[str, object]] | list[tuple[str, int]]) -> str:
    lines = [f"| {head} | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"
