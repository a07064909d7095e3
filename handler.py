"""Entry of the worker: RunPod's job loop, its local API, or one job on a desk. See README.md."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from comfy_worker.serverless.handler import handler

__all__ = ["handler"]


def main() -> int:
    """Start what the environment and the arguments ask for; return the exit code."""
    from comfy_worker.entry import run

    return run(sys.argv[1:], os.environ)


if __name__ == "__main__":
    sys.exit(main())
