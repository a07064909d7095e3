"""Kill and disconnect random parts of a fleet under load, and count lost and doubled jobs, outputs and webhooks.

    python -m benchmarks.fleet_chaos [--jobs N] [--faults N] [--seed N] [--output FOLDER]

The exit code is 1 if a job was lost or doubled, an output was incomplete, or a webhook was missing or repeated without
a kill. The folder gets the table and the logs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.fleet_chaos.report import as_markdown
from benchmarks.fleet_chaos.run import run


def main() -> int:
    """Run it, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet_chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("output/fleet_chaos"))
    options = parser.parse_args()
    # Like Ctrl-C, so that all processes that it started end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = run(options.jobs, options.faults, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "fleet_chaos.md").write_text(as_markdown(report), encoding="utf-8")
    for name, log in report.logs.items():
        (options.output / f"{name}.log").write_text(log, encoding="utf-8")
    print(as_markdown(report))
    for violation in report.violations:
        print(f"- {violation}")
    return int(bool(report.violations))


if __name__ == "__main__":
    sys.exit(main())
