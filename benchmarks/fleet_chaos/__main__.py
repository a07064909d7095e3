"""Kill and cut off every part of a fleet under load, at random.

    python -m benchmarks.fleet_chaos [--jobs N] [--faults N] [--seed N] [--output FOLDER]

Exit code 1 if a job was lost, doubled or not told, or an output was not whole. The folder gets the table and the logs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.fleet_chaos.found import as_markdown
from benchmarks.fleet_chaos.run import run


def main() -> int:
    """Run it and print a table."""
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
    # Ended as by Ctrl-C: what it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = run(options.jobs, options.faults, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "fleet_chaos.md").write_text(as_markdown(found), encoding="utf-8")
    for name, log in found.logs.items():
        (options.output / f"{name}.log").write_text(log, encoding="utf-8")
    print(as_markdown(found))
    for violation in found.violations:
        print(f"- {violation}")
    return int(bool(found.violations))


if __name__ == "__main__":
    sys.exit(main())
