"""Soak the worker: thousands of jobs, faults by lot, and what must be true of every job all the same.

    python -m benchmarks.soak [--jobs N] [--seed N] [--remote] [--output FOLDER]

Exit code 1 if anything was wrong. The folder gets `soak.json` with all figures, `soak.md` with the tables,
`soak.png` with the worker's memory and handles over time, and `worker.log`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.soak.plot import plot
from benchmarks.soak.report import as_json, as_markdown
from benchmarks.soak.run import soak


def main() -> int:
    """Run the soak and print what it found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--remote", action="store_true", help="ComfyUI is somebody else's: no pid file, no folders")
    parser.add_argument("--output", type=Path, default=Path("output/soak"))
    options = parser.parse_args()
    # Ended as by Ctrl-C: what it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = soak(options.jobs, options.seed, remote=options.remote)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.json").write_text(as_json(found), encoding="utf-8")
    (options.output / "soak.md").write_text(as_markdown(found), encoding="utf-8")
    (options.output / "soak.png").write_bytes(plot(found.samples))
    (options.output / "worker.log").write_text(found.worker_log, encoding="utf-8")
    print(as_markdown(found))
    for violation in found.violations:
        print(f"- {violation}")
    return int(bool(found.violations))


if __name__ == "__main__":
    sys.exit(main())
