"""The entry point of the worker: RunPod's job loop, its local API, or one job on this machine. See README.md."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

try:
    from comfy_worker.serverless.handler import handler
except ModuleNotFoundError as error:
    if __name__ != "__main__" or not error.name or error.name.partition(".")[0] == "comfy_worker":
        raise
    sys.exit(
        f"The package {error.name} is not installed for {sys.executable}: run `make install` in the folder of "
        "handler.py, then `.venv/bin/python handler.py`."
    )

__all__ = ["handler"]


def main() -> int:
    """Run what the environment and the arguments select, and return the exit code."""
    from comfy_worker.cli.handler import run

    return run(sys.argv[1:], os.environ)


if __name__ == "__main__":
    sys.exit(main())
