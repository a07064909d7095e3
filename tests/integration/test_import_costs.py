"""What importing the handler does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import comfy_worker

SOURCE = Path(comfy_worker.__file__).parent


ROOT = SOURCE.parents[1]


def test_importing_the_handler_loads_little() -> None:
    script = "import json, sys; sys.path.insert(0, sys.argv[1]); import handler; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "comfy_worker.job.pipeline" in loaded
    late = {
        "fastapi",
        "sqlalchemy",
        "boto3",
        "botocore",
        "PIL",
        "av",
        "numpy",
        "celery",
        "redis",
        "comfy_emulator",
    }
    assert loaded & late == set()
