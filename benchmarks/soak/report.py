"""The report of a soak test as JSON and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from benchmarks.soak.run import SoakReport


def as_json(report: SoakReport) -> str:
    """Return all figures, with a sample of the worker's process for each round."""
    figures = {name: value for name, value in vars(report).items() if name != "worker_log"}
    figures |= {"samples": [asdict(sample) for sample in report.samples], "trend": asdict(report.trend)}
    return json.dumps(figures, indent=1)


def as_markdown(report: SoakReport) -> str:
    """Return the tables for docs/development/soak.md."""
    start, end = report.trend.start, report.trend.end
    summary = [
        ("jobs", report.jobs),
        ("seed", report.seed),
        ("ComfyUI", "remote" if report.remote else "local"),
        ("minutes", round(report.seconds / 60, 1)),
        ("rounds", report.rounds),
        ("jobs under a fault", report.touched),
        ("faults met", report.fault_counts.total()),
        ("starts of ComfyUI", report.comfyui_starts),
        ("most jobs in the worker at once", report.peak_in_flight),
        ("jobs lost (no final state)", report.jobs - report.ended_jobs),
        ("prompts left in ComfyUI", report.prompts_left),
        ("files left in ComfyUI's folders", report.files_left),
        ("violations", len(report.violations)),
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
        f"Memory grows by {report.trend.rss_kb_per_job:.2f} KB per job (least squares after the warm-up).\n",
        _table(("outcome", "jobs"), _sorted(report.outcomes)),
        _table(("shape of job", "jobs"), _sorted(report.shapes)),
        _table(
            ("fault", "met", "set in vain"),
            [
                (name, report.fault_counts[name], report.unmet[name])
                for name in sorted({*report.fault_counts, *report.unmet})
            ],
        ),
    ]
    return "\n".join(parts)


def _sorted(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
