"""What a soak found, for programs and for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from benchmarks.soak.run import Soak


def as_json(found: Soak) -> str:
    """Return all figures, and a sample of the worker's process for each round."""
    figures = {name: value for name, value in vars(found).items() if name != "worker_log"}
    figures |= {"samples": [asdict(sample) for sample in found.samples], "trend": asdict(found.trend)}
    return json.dumps(figures, indent=1)


def as_markdown(found: Soak) -> str:
    """Return the tables for docs/development/soak.md."""
    start, end = found.trend.start, found.trend.end
    summary = [
        ("jobs", found.jobs),
        ("seed", found.seed),
        ("ComfyUI is", "somebody else's" if found.remote else "the worker's own"),
        ("minutes", round(found.seconds / 60, 1)),
        ("rounds", found.rounds),
        ("jobs during which a fault was on", found.touched),
        ("faults met", found.fault_counts.total()),
        ("starts of ComfyUI", found.comfyui_starts),
        ("most jobs in the worker's hands at once", found.peak_in_flight),
        ("jobs lost (no final state)", found.jobs - found.ended_jobs),
        ("prompts left in ComfyUI", found.prompts_left),
        ("files left in ComfyUI's folders", found.files_left),
        ("violations", len(found.violations)),
    ]
    handles = [
        ("memory (RSS), MB", start.rss_mb, end.rss_mb),
        ("open files", start.fds, end.fds),
        ("of these sockets", start.sockets, end.sockets),
        ("threads", start.threads, end.threads),
    ]
    parts = [
        _table(("soak", ""), summary),
        _table(("the worker's process", "after the warm-up", "at the end"), handles),
        f"Memory grows by {found.trend.rss_kb_per_job:.2f} KB a job (least squares after the warm-up).\n",
        _table(("outcome", "jobs"), _sorted(found.outcomes)),
        _table(("shape of job", "jobs"), _sorted(found.shapes)),
        _table(
            ("fault", "met", "set in vain"),
            [
                (name, found.fault_counts[name], found.unmet[name])
                for name in sorted({*found.fault_counts, *found.unmet})
            ],
        ),
    ]
    return "\n".join(parts)


def _sorted(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
