"""The result of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ChaosReport:
    """Figures of a run.

    Attributes:
        accepted: accepted jobs.
        retried: requests without a response, or with status 503.
        faults: faults by kind.
        states: final states of the jobs.
        restarted: how often a running job was queued again because its worker was lost.
        lost: jobs that did not end, or are not in the database.
        doubled: jobs that ended twice, or second jobs of one request.
        outputs: correct outputs.
        webhooks: received webhooks by id.
        webhooks_missing: ended jobs without a webhook.
        webhooks_repeated: webhooks received again with the same id, without a kill of a gateway in between.
        webhooks_repeated_after_kill: webhooks received again because a kill came before their delivery was stored.
        violations: sentences on what must not happen.
    """

    seed: int
    accepted: int = 0
    retried: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    restarted: int = 0
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


def as_markdown(report: ChaosReport) -> str:
    """Return the tables for docs/development/soak.md."""
    figures: list[tuple[str, object]] = [
        ("seed", report.seed),
        ("minutes", round(report.seconds / 60, 1)),
        ("jobs accepted", report.accepted),
        ("requests sent again", report.retried),
        ("faults", report.faults.total()),
        *((f"ended as {state}", count) for state, count in sorted(report.states.items())),
        ("restarted after their worker was lost", report.restarted),
        ("lost", report.lost),
        ("doubled", report.doubled),
        ("outputs checked", report.outputs),
        ("webhooks", report.webhooks),
        ("webhooks missing", report.webhooks_missing),
        ("webhooks repeated", report.webhooks_repeated),
        ("webhooks repeated because of a kill, under their id", report.webhooks_repeated_after_kill),
        ("violations", len(report.violations)),
    ]
    return "\n".join([_table("fleet", figures), _table("fault", sorted(report.faults.items()))])


def _table(head: str, rows: list[tuple[str, object]] | list[tuple[str, int]]) -> str:
    lines = [f"| {head} | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"
