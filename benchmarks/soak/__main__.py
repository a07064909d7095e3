"""Run thousands of jobs through the worker under random faults, and check each job.

    python -m benchmarks.soak [--jobs N] [--seed N] [--remote] [--output FOLDER]

It counts lost, doubled and mixed-up jobs, leftover prompts and files, and the growth of the worker's memory (MB), open
files and threads. The exit code is 1 if anything was wrong. The folder gets `soak.json` with all figures, `soak.md`
with the tables, `soak.png` with memory and handles over the number of jobs, and `worker.log`.
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
    """Run the soak test, and print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--remote", action="store_true", help="no access to ComfyUI's process and folders")
    parser.add_argument("--output", type=Path, default=Path("output/soak"))
    options = parser.parse_args()
    # Like Ctrl-C, so that all processes that it started end too.
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
