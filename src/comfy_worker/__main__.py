"""`python -m comfy_worker` is `comfy-worker`."""

from __future__ import annotations

import sys

from comfy_worker.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
