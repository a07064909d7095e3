"""Kill a gateway at random times under load, and count lost and doubled jobs and webhooks.

    python -m benchmarks.gateway_kill [--kills N] [--seed N]

It runs once on SQLite and once on PostgreSQL. The exit code is 1 if a job was lost or doubled, or had no webhook.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.gateway_kill.run import KillReport, run
from tests.support.databases.postgres import postgres


def main() -> int:
    """Run on both databases and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway_kill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = {"SQLite": run(options.kills, options.seed)}
    with postgres() as server:
        report["PostgreSQL"] = run(options.kills, options.seed, server.new_database())
    print(_table(report))
    violations = [f"- {name}: {text}" for name, one in report.items() for text in one.violations]
    print("\n".join(violations))
    return int(bool(violations))


def _table(report: dict[str, KillReport]) -> str:
    names = ("kills", "kills_before_listening", "accepted", "states", "resumed", "repeated", "seconds", "violations")
    rows = [f"| | {' | '.join(report)} |", "| --- |" + " ---: |" * len(report)]
    for name in names:
        values = [getattr(one, name) for one in report.values()]
        shown = [str(len(v)) if name == "violations" else str(dict(v)) if name == "states" else str(v) for v in values]
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(shown)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
